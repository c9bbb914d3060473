"""Weights in and out of Hugging Face's format: a folder of safetensors with a `config.json`.

Every rank reads only the slices that it holds. For writing, one rank of each pipeline stage gathers a tensor at a time
and writes files of bounded size, so that no rank ever holds the whole model.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from runtime.hf_config import check_exchanged, hf_config
from runtime.hf_names import Place, hf_place
from runtime.model import Transformer, named_weights
from runtime.shards import local_ranges, local_tensor
from simulator.errors import UserError
from simulator.files import read_json, write_json
from simulator.hf import read_config
from simulator.layout import Layout
from simulator.model import ModelSpec

INDEX = "model.safetensors.index.json"
# What transformers cuts files at.
FILE_BYTES = 5 * 10**9
# What values may be stored as. 8-bit floats come with scales of their own, which nothing here applies.
_DTYPES = ("F32", "BF16", "F16", "F64")


def hf_names(spec: ModelSpec, names: Iterable[str]) -> dict[str, Place]:
    """Where weights lie in Hugging Face's files, by the name that a stage gives them.

    Raises:
        UserError: the files of this family are not known.
    """
    check_exchanged(spec)
    return {name: hf_place(spec, name) for name in names}


def load_safetensors(stages: Iterable[nn.Module], folder: Path | str) -> None:
    """Fill the parameters of this rank's stages, cut in any way, with the values in a folder of safetensors.

    Raises:
        UserError: the folder holds no such model, or another one than the job's.
    """
    files = _Files(Path(folder))
    for stage in map(_transformer, stages):
        _check_config(files.folder, stage.spec)
        parameters = dict(named_weights(stage))
        places = hf_names(stage.spec, parameters)
        tied = hf_place(stage.spec, "tok_embeddings.weight") if stage.spec.tie_word_embeddings else None
        with torch.no_grad():
            for name, parameter in parameters.items():
                place = places[name] if name != "output.weight" or tied is None else tied
                part = local_tensor(parameter)
                part.copy_(files.read(place, parameter.shape, local_ranges(parameter)))
                if not part.isfinite().all():
                    raise UserError(f"weights '{files.folder}': {place.name} holds values that are not finite")


def save_safetensors(
    stages: Iterable[nn.Module], folder: Path | str, *, pp_rank: int, writes: bool, file_bytes: int = FILE_BYTES
) -> None:
    """Write the model of all ranks, which must all call this, as a folder that `transformers` loads.

    Args:
        pp_rank: which part of the pipeline this rank's stages are.
        writes: whether this rank writes them: true on exactly one rank of each `pp_rank`.
        file_bytes: about how large a file is at most; a tensor is never cut.

    Raises:
        UserError: the files of this family are not known, or the folder cannot be written.
    """
    folder, owned = Path(folder), list(map(_transformer, stages))
    config = hf_config(owned[0].spec)
    written, failed = _write_parts(folder, _batches(owned, writes, file_bytes), pp_rank)
    gathered = _gather((written, failed))
    if reasons := [reason for _, reason in gathered if reason]:
        for name, _ in written:
            (folder / name).unlink(missing_ok=True)
        raise UserError(f"cannot write '{folder}': {reasons[0]}")
    everything = [part for parts, _ in gathered for part in parts]
    names = _file_names(len(everything))
    for (part, _), name in zip(everything, names, strict=True):
        if part in {own for own, _ in written}:
            # The library makes files private; these are as readable as any that the user makes.
            (folder / part).chmod(0o666 & ~_umask())
            (folder / part).replace(folder / name)
    # The index goes last, and only when every file that it names is there.
    _gather(None)
    if writes and pp_rank == 0:
        _write_index(folder, [(name, sizes) for name, (_, sizes) in zip(names, everything, strict=True)])
        write_json(folder / "config.json", config)
    _gather(None)


def _write_parts(
    folder: Path, batches: Iterator[dict[str, Tensor]], pp_rank: int
) -> tuple[list[tuple[str, dict[str, int]]], str]:
    """Names and sizes of what was written, and why no more was. After a failure the rest is gathered all the same,
    because other ranks take part in that."""
    written: list[tuple[str, dict[str, int]]] = []
    failed = ""
    for number, tensors in enumerate(batches):
        name = f".part-{pp_rank}-{number}.safetensors"
        if failed:
            continue
        written.append((name, {key: tensor.nbytes for key, tensor in tensors.items()}))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / name, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            failed = str(error)
    return written, failed


def export_model(stages: Iterable[nn.Module], layout: Layout, folder: Path | str) -> None:
    """`save_safetensors` by the first rank of each pipeline stage. All ranks must call it."""
    place = layout.coordinates(dist.get_rank())
    writes = not any(number for axis, number in place.items() if axis != "pp")
    save_safetensors(stages, folder, pp_rank=place["pp"], writes=writes)


class _Files:
    """The safetensors of a folder, opened when they are needed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.opened = folder, {}  # type: tuple[Path, dict[Path, Any]]
        if not folder.is_dir():
            raise UserError(f"weights '{folder}' is not a folder; name one with safetensors and their config.json")
        if (folder / INDEX).exists():
            listed = read_json(folder / INDEX, "weights").get("weight_map")
            if not isinstance(listed, dict) or not all(_is_name(file) for file in listed.values()):
                raise UserError(f"weights '{folder / INDEX}': weight_map must give each tensor a file of this folder")
            self.where = {name: folder / file for name, file in listed.items()}
        else:
            found = sorted(folder.glob("*.safetensors"))
            if not found:
                raise UserError(f"weights '{folder}' holds no safetensors")
            self.where = {name: path for path in found for name in self._open(path).keys()}  # noqa: SIM118

    def read(self, place: Place, shape: torch.Size, ranges: tuple[tuple[int, int], ...]) -> Tensor:
        """Our rows and columns `ranges` of the tensor of `shape` that lies at `place`."""
        name = self._find(place.name)
        try:
            stored = self._open(self.where[name]).get_slice(name)
        except SafetensorError as error:
            raise UserError(f"weights '{self.where[name]}' cannot be read: {error}") from None
        if stored.get_dtype() not in _DTYPES:
            raise UserError(
                f"weights '{self.folder}': {name} holds {stored.get_dtype()}, but must hold one of {', '.join(_DTYPES)}"
            )
        expected = list(their_shape(place, shape))
        if stored.get_shape() != expected:
            raise UserError(
                f"weights '{self.folder}': {name} has the shape {stored.get_shape()}, but the model needs {expected}"
            )
        if any(first == last for first, last in ranges):
            return torch.empty([last - first for first, last in ranges])
        (first, last), columns = ranges[0], [slice(*r) for r in ranges[1:]]
        parts = [
            stored[(*columns, rows)].T if place.transposed else stored[(rows, *columns)]
            for _, start, count in place.segments(first, last, shape[0])
            for rows in [slice(start, start + count)]
        ]
        return torch.cat(parts)

    def _open(self, path: Path) -> Any:
        if path not in self.opened:
            try:
                self.opened[path] = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"weights '{path}' cannot be read: {error}") from None
        return self.opened[path]

    def _find(self, name: str) -> str:
        """Files of a model without a head leave out the first word of the names, as those of openai-community/gpt2."""
        for candidate in (name, name.partition(".")[2]):
            if candidate in self.where:
                return candidate
        raise UserError(f"weights '{self.folder}' hold no tensor '{name}'")


def their_shape(place: Place, ours: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the whole tensor that one of ours lies in."""
    shape = (ours[0] * place.parts + place.offset, *ours[1:])
    return tuple(reversed(shape)) if place.transposed else shape


def _batches(stages: list[Transformer], writes: bool, most: int) -> Iterator[dict[str, Tensor]]:
    """Their tensors, gathered one by one by all ranks of a stage, in batches of about `most` bytes on the rank that
    writes; nothing on the others."""
    batch: dict[str, Tensor] = {}
    for stage in stages:
        parameters = dict(named_weights(stage))
        members = defaultdict(list)
        for name, place in hf_names(stage.spec, parameters).items():
            members[place.name].append((place, parameters[name]))
        for name, parts in members.items():
            whole = _assemble(parts, writes)
            if whole is None:
                continue
            if batch and sum(t.nbytes for t in batch.values()) + whole.nbytes > most:
                yield batch
                batch = {}
            batch[name] = whole
    if batch:
        yield batch


def _assemble(parts: list[tuple[Place, nn.Parameter]], writes: bool) -> Tensor | None:
    """One of their tensors from all of ours that it is made of."""
    whole: Tensor | None = None
    for place, parameter in parts:
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if not writes:
            continue
        full = full.detach().cpu()
        if whole is None:
            whole = full.new_zeros((full.shape[0] * place.parts + place.offset, *full.shape[1:]))
        for row, start, count in place.segments(0, full.shape[0], full.shape[0]):
            whole[start : start + count] = full[row : row + count]
    return whole if whole is None or not parts[0][0].transposed else whole.T.contiguous()


def _transformer(stage: nn.Module) -> Transformer:
    """The stage itself where DDP has wrapped it."""
    inner = getattr(stage, "module", stage)
    assert isinstance(inner, Transformer)
    return inner


def _check_config(folder: Path, spec: ModelSpec) -> None:
    """Weights of another model may have the same shapes."""
    if not (folder / "config.json").exists():
        return
    theirs = read_config(read_json(folder / "config.json", "weights"), spec.name)
    for field in dataclasses.fields(spec):
        ours, other = getattr(spec, field.name), getattr(theirs, field.name)
        if ours != other and (field.name != "max_position_embeddings" or spec.position == "learned"):
            raise UserError(f"weights '{folder}' are of a model with {field.name} = {other}, but the job's has {ours}")


def _is_name(file: object) -> bool:
    """Whether this is the name of a file, and no way to another folder."""
    return isinstance(file, str) and Path(file).name == file


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_index(folder: Path, files: list[tuple[str, dict[str, int]]]) -> None:
    kept = {name for name, _ in files}
    for old in folder.glob("model*.safetensors"):
        # Of an earlier export; other files are the user's.
        if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", old.name) and old.name not in kept:
            old.unlink()
    if len(files) == 1:
        (folder / INDEX).unlink(missing_ok=True)
        return
    places = {tensor: name for name, sizes in files for tensor in sizes}
    total = sum(size for _, sizes in files for size in sizes.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _gather(value: Any) -> list[Any]:
    """What every rank has, in the order of ranks; also a barrier."""
    if not dist.is_initialized():
        return [value]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
