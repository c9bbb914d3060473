"""Token streams: what `training.data` names, as one array of token ids that is mapped and not read.

    folder                  the text files below it: bytes, or tokens of `training.tokenizer`
    NAME.bin                raw ids, as nanoGPT writes them
    NAME.bin and NAME.idx   Megatron-LM's indexed data set; NAME alone names it too

Only numpy is needed: the launcher looks at the data before it starts a process.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simulator.errors import UserError
from simulator.job import Training

VOCABULARY = 256
MOST_BYTES = 64 * 2**20
# Not somebody's text: installed packages below the standard library, caches, version control.
_SKIPPED = ("site-packages", "dist-packages", "__pycache__")
# Tokenizers do not say which of their tokens mean these; these are the names that they have.
_MASK_TOKENS = ("[MASK]", "<mask>", "<extra_id_0>")
_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
# Text is tokenised in pieces of about this many bytes, cut behind a line.
_PIECE_BYTES = 2**20
# Megatron-LM's IndexedDataset (megatron/core/datasets/indexed_dataset.py): magic, version, dtype, two counts.
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


class Stream(NamedTuple):
    """Token ids of shape (length,) and any integer dtype.

    vocabulary is the number of different ids that may come, 0 if nobody says; mask_token the id that stands for a
    hidden token, -1 if none does.
    """

    ids: np.ndarray
    vocabulary: int = 0
    mask_token: int = -1


def open_stream(training: Training, vocab_size: int, most: int = MOST_BYTES) -> Stream:
    """The stream that a job names. Of bytes at most `most` are read.

    Raises:
        UserError: there is no such data, or it is not of this format.
    """
    name, path = training.data, Path(training.data)
    if not name or path.is_dir():
        if training.tokenizer:
            return _tokenised(training)
        return Stream(read_tokens(name, most), VOCABULARY, -1)
    if training.tokenizer:
        raise UserError(f"training.tokenizer is for folders of text, but training.data = '{name}' is not a folder")
    stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    binary, index = (stem.parent / (stem.name + suffix) for suffix in (".bin", ".idx"))
    if index.is_file():
        return Stream(_read_indexed(binary, index))
    if path.suffix == ".bin" and binary.is_file():
        return Stream(_read_raw(binary, vocab_size))
    raise UserError(
        f"training.data = '{name}' is not a folder; name a folder with text files, a .bin file with token ids, "
        "or a Megatron-LM data set of a .bin and an .idx file"
    )


def read_tokens(folder: str, most: int = MOST_BYTES) -> np.ndarray:
    """The text files below a folder, in sorted order, as one array of bytes, cut off after `most` of them.

    A file is text if its first 8 KiB hold no zero byte (git's rule). "" means the Python standard library's source.

    Raises:
        UserError: there is no such folder, or no text in it.
    """
    # Mapped from a file without a name, so that a rank holds only the pages that it samples from.
    with tempfile.TemporaryFile() as file:
        left = most
        for path in _texts(folder):
            if left <= 0:
                break
            left -= file.write(_read_text(path, left))
        if left == most:
            raise UserError(f"training.data = '{folder}' holds no text file")
        file.flush()
        return np.memmap(file, dtype=np.uint8, mode="r")


def _texts(folder: str) -> list[Path]:
    root = Path(folder or sysconfig.get_paths()["stdlib"])
    if not root.is_dir():
        raise UserError(f"training.data = '{folder}' is not a folder; name a folder with text files")
    found = []
    for parent, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIPPED and not f.startswith(".")]
        paths = (Path(parent, name) for name in names if not name.startswith("."))
        # A pipe would be waited for, a link may lead nowhere.
        found += [path for path in paths if path.is_file()]
    return sorted(path for path in found if folder or path.suffix == ".py")


def _read_text(path: Path, most: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(most)
    except OSError as error:
        raise UserError(f"training.data: '{path}' cannot be read: {error.strerror}") from None
    return b"" if b"\0" in data[:8192] else data


def _read_raw(path: Path, vocab_size: int) -> np.ndarray:
    """nanoGPT's format: ids without a header, uint16, or uint32 where the vocabulary needs it."""
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    ids = _map(path, dtype)
    head = ids[:4096]
    if dtype.itemsize == 2 and len(head) >= 64 and not head[1::2].any():
        raise UserError(
            f"training.data = '{path}': every other id is 0, so these are 32-bit ids, but vocab_size = {vocab_size} "
            "means 16 bits; write them as uint16"
        )
    return ids


def _read_indexed(binary: Path, index: Path) -> np.ndarray:
    """Megatron-LM's format: documents one behind the other in `binary`, their dtype and lengths in `index`."""
    where = f"training.data: '{index}'"
    try:
        content = index.read_bytes()
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}") from None
    if len(content) < _HEADER.size or not content.startswith(_MAGIC):
        raise UserError(f"{where} does not begin like an index of Megatron-LM (MMIDIDX)")
    _, version, code, sequences, documents = _HEADER.unpack_from(content)
    if version != 1 or code not in _DTYPES:
        raise UserError(
            f"{where} has version {version} and dtype code {code}, but version 1 with codes {list(_DTYPES)} is read"
        )
    # Behind the header: int32 lengths and int64 offsets of the sequences, int64 first sequences of the documents.
    if len(content) < _HEADER.size + 12 * sequences + 8 * documents:
        raise UserError(f"{where} is cut off: {sequences} sequences and {documents} documents do not fit into it")
    lengths = np.frombuffer(content, "<i4", sequences, _HEADER.size)
    ids = _map(binary, np.dtype(_DTYPES[code]).newbyteorder("<"))
    if sequences and int(lengths.min()) < 0:
        raise UserError(f"{where} names a sequence of {int(lengths.min())} tokens")
    if (total := int(lengths.sum(dtype=np.int64))) != len(ids):
        raise UserError(f"training.data: '{binary}' holds {len(ids)} tokens, but its index counts {total}")
    return ids


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    try:
        size = path.stat().st_size
        if size == 0 or size % dtype.itemsize:
            raise UserError(f"training.data = '{path}': {size} bytes are no whole number of {dtype.name} ids above 0")
        return np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        raise UserError(f"training.data = '{path}' cannot be read: {error.strerror}") from None


def _tokenised(training: Training) -> Stream:
    """The text of a folder through a `tokenizer.json`, from a cache named by what text and tokenizer hold.

    The first process of a machine that wants it does the work, the others wait for its lock.
    """
    tokenizer = _load_tokenizer(training.tokenizer)
    vocabulary = tokenizer.get_vocab_size(with_added_tokens=True)
    mask = next((i for i in map(tokenizer.token_to_id, _MASK_TOKENS) if i is not None), -1)
    dtype = np.dtype("<u2" if vocabulary <= 2**16 else "<u4")
    paths = _texts(training.data)
    path = _cache_folder() / f"{_key(Path(training.tokenizer), paths)}.bin"
    with _lock(path.with_suffix(".lock")):
        if not path.exists() or not path.stat().st_size or path.stat().st_size % dtype.itemsize:
            _write_ids(path, _encoded(tokenizer, paths), dtype, training.data)
    return Stream(np.memmap(path, dtype=dtype, mode="r"), vocabulary, mask)


def _load_tokenizer(name: str) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError("training.tokenizer needs the package tokenizers: pip install tokenizers") from None
    path = Path(name)
    if not path.is_file():
        raise UserError(f"training.tokenizer = '{name}' is not a file; name a tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no exceptions of its own
        raise UserError(f"training.tokenizer = '{name}' is not a tokenizer.json: {error}") from None


def _encoded(tokenizer: Any, paths: Iterable[Path]) -> Iterator[list[int]]:
    """Ids of each piece of each file, and between files the token that ends a text, if there is one."""
    end = next((i for i in map(tokenizer.token_to_id, _END_TOKENS) if i is not None), None)
    for path in paths:
        text = _read_text(path).decode("utf-8", errors="replace")
        for piece in _pieces(text):
            yield tokenizer.encode(piece, add_special_tokens=False).ids
        if text and end is not None:
            yield [end]


def _pieces(text: str) -> Iterator[str]:
    first = 0
    while first < len(text):
        last = text.find("\n", first + _PIECE_BYTES) + 1 or len(text)
        yield text[first:last]
        first = last


def _write_ids(path: Path, ids: Iterable[list[int]], dtype: np.dtype, folder: str) -> None:
    """Write a cache file whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            if not sum(file.write(np.asarray(part, dtype).tobytes()) for part in ids):
                raise UserError(f"training.data = '{folder}' holds no text file")
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _key(tokenizer: Path, paths: Iterable[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in (tokenizer, *paths):
        content = path.read_bytes() if path == tokenizer else _read_text(path)
        digest.update(f"{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def _cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layoutwise" / "tokens"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write '{folder}': {error.strerror}") from None
    return folder


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
