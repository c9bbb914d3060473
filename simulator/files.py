"""Files in, dataclasses out, and back. Everything a user wrote is checked here, with one sentence when it is wrong.

pydantic does the checking (unknown keys are errors, types are strict); its messages are turned into ours.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from simulator.errors import UserError, nearest

T = TypeVar("T")

# What every dataclass read from a file carries as `__pydantic_config__`.
STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


def read_text(path: Path | str, what: str) -> str:
    """The text of a file, or a UserError that says what was looked for and why it could not be read."""
    path = Path(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob(f"*{path.suffix}")] if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) if path.suffix and siblings else ""
        hint = hint if "did you mean" in hint else ""
        raise UserError(f"{what} '{path}' does not exist{hint}") from None
    except IsADirectoryError:
        raise UserError(f"{what} '{path}' is a folder, not a file") from None
    except UnicodeDecodeError:
        raise UserError(f"{what} '{path}' is not a UTF-8 text file") from None
    except OSError as error:
        raise UserError(f"{what} '{path}' cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{what} {str(path)[:60]!r} is no path: {error}") from None


def read_json(path: Path | str, what: str) -> dict[str, Any]:
    """The object in a JSON file; a truncated file is named as such with the place where it ends."""
    text = read_text(path, what)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{what} '{path}' is not valid JSON (line {error.lineno}: {error.msg}); is it cut off?"
        ) from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{what} '{path}' holds JSON that cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{what} '{path}' holds a JSON {type(data).__name__}, but an object is needed")
    return data


def read_toml(path: Path | str, what: str) -> dict[str, Any]:
    """The table in a TOML file."""
    text = read_text(path, what)
    try:
        return tomllib.loads(text)
    except (RecursionError, ValueError) as error:
        raise UserError(f"{what} '{path}' is not valid TOML: {error}") from None


def check_writable(path: Path | str) -> None:
    """Raise UserError now where `write_bytes` would after the work is done."""
    path = Path(path)
    folder = next((p for p in path.absolute().parents if p.exists()), Path("/"))
    if not folder.is_dir():
        raise UserError(f"cannot write '{path}': '{folder}' is not a folder")
    if path.is_dir():
        raise UserError(f"cannot write '{path}': it is a folder")
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write '{path}': no permission in '{folder}'")


def write_text(path: Path | str, text: str) -> Path:
    """Write a text file atomically (`write_bytes`)."""
    return write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path | str, content: bytes) -> Path:
    """Write a file so that a reader sees the old one or the whole new one, never a part.

    Raises UserError when the folder cannot be made or written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp makes the file private; a result is as readable as any file the user makes.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise UserError(f"cannot write '{path}': {error.strerror}") from None
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_json(path: Path | str, data: Any) -> Path:
    """Write a dataclass or plain data as indented JSON, atomically."""
    return write_text(path, json.dumps(plain(data), indent=2, ensure_ascii=False) + "\n")


def plain(data: Any) -> Any:
    """Dataclasses, tuples and mappings as what `json` can write."""
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return {f.name: plain(getattr(data, f.name)) for f in dataclasses.fields(data)}
    if isinstance(data, dict):
        return {str(k): plain(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [plain(v) for v in data]
    return data


def to_dataclass(kind: type[T], data: dict[str, Any], where: str) -> T:
    """Build a frozen dataclass from plain data, strictly.

    Args:
        kind: the dataclass; its `__pydantic_config__` is STRICT, and so are those of the dataclasses in it.
        where: what the data is, for the message: "job 'llama.toml'".

    Raises:
        UserError: the first thing that is wrong, with its key, its value, the rule and the nearest valid key.
    """
    from pydantic import ValidationError

    try:
        # Through JSON, because strict mode then still takes a list for a tuple, and an integer for a float. TOML's
        # dates become text, which no field but a text takes.
        adapter = _adapter(kind)  # type: ignore[arg-type]  # mypy does not know that classes hash
        result: T = adapter.validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        # A misspelt key that is needed is both unknown and missing: the former says more.
        weight = {"unexpected_keyword_argument": 0, "missing": 2, "missing_argument": 2}
        first = min(error.errors(), key=lambda problem: weight.get(problem["type"], 1))
        raise UserError(f"{where}: {_sentence(kind, first)}") from None
    return result


@functools.cache
def _adapter(kind: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _sentence(kind: type, problem: Any) -> str:
    """pydantic's first problem in our words."""
    key = ".".join(str(part) for part in problem["loc"])
    rule = problem["type"]
    if rule == "unexpected_keyword_argument":
        owner = _at(kind, problem["loc"][:-1])
        names = [f.name for f in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []
        return f"unknown key '{key}'" + (nearest(str(problem["loc"][-1]), names) if names else "")
    if rule in ("missing", "missing_argument"):
        return f"the key '{key}' is missing"
    if rule == "value_error":
        return str(problem["ctx"]["error"])
    message = problem["msg"][0].lower() + problem["msg"][1:]
    if rule == "quantity":
        return f"{key}: {message}"
    value = json.dumps(problem["input"], default=str)
    return f"{key} = {value if len(value) < 60 else value[:57] + '...'}: {message}"


def _at(kind: Any, path: tuple[Any, ...]) -> Any:
    """The dataclass that a path of keys leads to, None where it leads elsewhere."""
    import typing

    for name in path:
        hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        kind = hints.get(name)
        kind = next((t for t in typing.get_args(kind) if dataclasses.is_dataclass(t)), kind)
    return kind
