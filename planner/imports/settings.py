"""What stands in a pasted command line or file, as names and values, before anybody asks what the names mean.

A command line, a shell script that fills arrays with flags, TOML, JSON and Python assignments all become the same
table; a name keeps how it was written, for messages.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from simulator.errors import UserError

_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::?[-=]([^}]*))?\})")
_NUMBER = re.compile(r"-?[0-9]+")
# Longer files than any script or configuration are no such thing.
_LONGEST = 1_000_000
# No size of anything has more digits, and Python itself refuses to read thousands of them.
_DIGITS = 18
# Flags with several values.
_LISTS = ("recompute-modules", "recompute_modules")


@dataclass
class Settings:
    """Names and values, and which of them were asked for. Names are in snake case without leading dashes; the part
    before the last point (torchtitan's sections, Megatron-Bridge's containers) is kept in `shown` alone."""

    values: dict[str, Any] = field(default_factory=dict)
    shown: dict[str, str] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)

    def add(self, written: str, value: Any) -> None:
        """Raises UserError where a name is there already with another value."""
        name = written.lstrip("-").replace("-", "_").rsplit(".", 1)[-1]
        if name in self.values and self.values[name] != value:
            before = self.values[name]
            raise UserError(f"'{written}' is given twice, as {_spelt(before)} and as {_spelt(value)}: leave one out")
        self.values[name] = value
        self.shown.setdefault(name, written)

    def has(self, *names: str) -> bool:
        return any(name in self.values for name in names)

    def value(self, *names: str) -> Any:
        """The value of the first of these names that is there and not null; they mean the same, so two that differ
        contradict each other (UserError)."""
        self.asked.update(names)
        found = [name for name in names if self.values.get(name) is not None]
        if len({str(self.values[name]) for name in found}) > 1:
            said = " and ".join(f"'{self.shown[name]}' = {_spelt(self.values[name])}" for name in found)
            raise UserError(f"{said} contradict each other: leave one out")
        return self.values[found[0]] if found else None

    def integer(self, *names: str, least: int = 1) -> int | None:
        """The same as an integer of at least `least`."""
        value = self.value(*names)
        if value is None:
            return None
        name = next(name for name in names if self.values.get(name) is not None)
        if variable := _VARIABLE.search(str(value)):
            raise UserError(
                f"'{self.shown[name]}': the variable {variable[1] or variable[2]} is not set in the pasted text; write "
                "its value"
            )
        if isinstance(value, str) and _NUMBER.fullmatch(value) and len(value) <= _DIGITS:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"'{self.shown[name]}' = {_spelt(value)[:40]} must be an integer of at least {least}")
        return value

    def flag(self, *names: str) -> bool:
        """Whether a switch is on: there without a value, or true."""
        value = self.value(*names)
        return value is not None and str(value).lower() not in ("false", "0", "none", "")

    def choice(self, name: str, choices: dict[str, Any]) -> Any:
        """What a word stands for, None if the name is not there. Raises UserError on another word."""
        value = self.value(name)
        if value is None:
            return None
        if str(value) not in choices:
            raise UserError(f"'{self.shown[name]}' = {_spelt(value)} is not one of {', '.join(choices)}")
        return choices[str(value)]

    def left(self) -> tuple[str, ...]:
        """What nobody asked for, as it was written, in its order."""
        return tuple(dict.fromkeys(self.shown[name] for name in self.values if name not in self.asked))


def _spelt(value: Any) -> str:
    return "true" if value is True else repr(value) if isinstance(value, str) else str(value)


def from_command(text: str) -> Settings:
    """The flags of a command line or of a shell script. Variables are filled in where the text sets them.

    Raises:
        UserError: an unclosed quote, a variable that the text does not set, a flag with two values.
    """
    found = Settings()
    words = list(_words(text))
    place = 0
    while place < len(words):
        word, place = words[place], place + 1
        if not word.startswith("--") or len(word) == 2:
            continue
        name, equals, value = word.partition("=")
        values = [value] if equals else []
        while not equals and place < len(words) and _is_value(words[place]):
            values.append(words[place])
            place += 1
        # Behind the one value of most flags stands what the launcher runs.
        found.add(name, " ".join(values if name.endswith(_LISTS) else values[:1]) if values else True)
    return found


def _is_value(word: str) -> bool:
    """A word after a flag is its value, unless it opens or closes an array or begins another command."""
    if word.startswith("-"):
        return bool(_NUMBER.fullmatch(word))
    return word not in ("(", ")", "&&", "||", ";", "|", "\\")


def _words(text: str) -> Iterator[str]:
    """The words of a shell text without comments; a word that only sets a variable is taken in, not given out."""
    if len(text) > _LONGEST:
        raise UserError("a pasted layout of more than a million characters is no command line")
    lines = text.replace("\\\r\n", " ").replace("\\\n", " ")
    # An array may close right behind its last word, and a command may end with a semicolon.
    lexer = shlex.shlex(lines, posix=True, punctuation_chars="();")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    variables: dict[str, str] = {}
    try:
        words = list(lexer)
    except ValueError as error:
        raise UserError(f"the pasted command line cannot be read: {str(error).lower()}; is it cut off?") from None
    for word in words:
        if _ASSIGNMENT.fullmatch(word):
            name, _, value = word.partition("=")
            variables[name] = _filled(value, variables)
        else:
            yield _filled(word, variables)


def _filled(word: str, variables: dict[str, str]) -> str:
    """A word with the variables that the text sets; others stay, because most are nobody's business here."""

    def value(match: re.Match[str]) -> str:
        return variables.get(match[1] or match[2]) or match[3] or match[0]

    return _VARIABLE.sub(value, word)


def from_json(text: str) -> Settings:
    """Names of a JSON object; those of a nested one carry its name: `zero_optimization.stage`."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the pasted JSON cannot be read: {error}; is it cut off?") from None
    return _nested(data)


def from_toml(text: str) -> Settings:
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the pasted TOML cannot be read: {error}") from None
    found = Settings()
    for table, values in data.items():
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            found.add(f"{table}.{name}" if name else table, value)
    return found


def _nested(data: dict[str, Any]) -> Settings:
    """Here a path is part of the name: DeepSpeed calls many things `enabled`."""
    found = Settings()
    for name, value in data.items():
        if not isinstance(value, dict):
            found.values[name] = value
            found.shown[name] = name
            continue
        for inner, one in value.items():
            found.values[f"{name}.{inner}"] = one
            found.shown[f"{name}.{inner}"] = f"{name}.{inner}"
    return found


def from_python(text: str) -> Settings:
    """The assignments of a recipe, `config.parallelism.tensor_parallel_degree = 8`, wherever they stand in it, and
    its constants in capitals. Nothing is run; a value that is no literal is kept as its source."""
    try:
        tree = ast.parse(text)
        nodes = list(ast.walk(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"the pasted Python cannot be read: {error}") from None
    found = Settings()
    for node in nodes:
        if not isinstance(node, ast.Assign) or len(node.targets) != 1:
            continue
        target = node.targets[0]
        if isinstance(target, ast.Attribute) or (isinstance(target, ast.Name) and target.id.isupper()):
            try:
                value = ast.literal_eval(node.value)
            except (ValueError, TypeError):
                value = ast.unparse(node.value)
            found.add(ast.unparse(target), value)
    return found
