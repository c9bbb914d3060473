"""Whether the C library gives freed memory back to the system: at once, so that the process holds what it uses, or
never, so that a step need not take its activations as fresh pages.

Fresh pages cost more than the kernels that fill them, so a run keeps what it frees. Then its resident set says little
of what it needs: glibc 2.36 finds no room for an aligned block in a freed one of the same size, so that the heap grows
beyond what lives in it, most where buffers of many sizes come and go. The first steps of a run therefore give back,
and what they hold at most is what the run needs.

Settings are glibc's (mallopt(3)); other C libraries have none, and nothing changes there.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

# mallopt's numbers (malloc.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# Blocks of this size and more are mapped one by one while memory goes back; below it are Python's and autograd's own.
_LARGE = 64 * 1024

# Steps that give freed memory back: the first one makes the optimizer's state, the second meets all of it.
COUNTED_STEPS = 2


def counted_steps(warmup: int) -> int:
    """How many of the warm-up steps give memory back; one at least is left to fill the heap before steps are timed.

    >>> counted_steps(5), counted_steps(3), counted_steps(2)
    (2, 2, 0)
    """
    return COUNTED_STEPS if warmup > COUNTED_STEPS else 0


def give_back_freed() -> bool:
    """From now on freed tensors leave the process. Returns whether the C library does so."""
    return _set({_MMAP_MAX: 65536, _MMAP_THRESHOLD: _LARGE, _TRIM_THRESHOLD: 2 * _LARGE})


def keep_freed() -> bool:
    """From now on freed tensors stay in the process, for those that follow. Returns whether the C library does so."""
    return _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1})


def short_of_memory(meminfo: Path = Path("/proc/meminfo"), share: float = 0.1) -> bool:
    """Whether less than this share of the machine's memory is left for anyone. Limits of control groups are not
    looked at; without /proc (macOS) the answer is no."""
    try:
        lines = (line.split() for line in meminfo.read_text().splitlines())
        found = {words[0]: float(words[1]) for words in lines if len(words) > 1}
        return found["MemAvailable:"] < share * found["MemTotal:"]
    except (OSError, KeyError, ValueError):
        return False


def trim() -> None:
    """Give back at once what was kept so far."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def _set(options: dict[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(name, value) == 1 for name, value in options.items())
