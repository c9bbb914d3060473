"""The one exception that means "the user can mend this": a sentence, and the exit code that goes with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simulator.layout import Layout


class UserError(Exception):
    """Bad input. The message is one sentence: the key, the value, the rule, the nearest valid choice."""

    exit_code = 2


class NothingFitsError(UserError):
    """The input is right, but no layout fits it. The message names the nearest misses and by how much; `misses` are
    they, nearest first: bytes too much, and the layout."""

    exit_code = 3

    def __init__(self, message: str, misses: Sequence[tuple[float, Layout]] = ()) -> None:
        super().__init__(message)
        self.misses = tuple(misses)


def nearest(word: str, choices: Iterable[str]) -> str:
    """A clause that helps after a wrong word: `; did you mean 'tp'?` or the list of what is valid.

    >>> nearest("lama-3.1-8b", ["gpt2", "llama-3.1-8b"])
    "; did you mean 'llama-3.1-8b'?"
    >>> nearest("x", ["fp32", "bf16"])
    '; valid: bf16, fp32'
    """
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; valid: {', '.join(choices)}"
