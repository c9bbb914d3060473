"""Quantities with their units in the value: `"400 Gb/s"` in a file is 5e10 bytes per second in the code.

Inside the code everything is SI: seconds, bytes, bytes per second, FLOP per second. GB is 1e9 bytes, GiB is 2^30.
Bits and bytes differ by a letter's case and a factor of eight, so the unit is never optional.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from simulator.errors import UserError

_PREFIX = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_SIZES = {p + "B": f for p, f in _PREFIX.items()}
_BITS = {p + "b": f / 8 for p, f in _PREFIX.items()}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_SHOWN_TIMES = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))
_DURATIONS = {
    **dict.fromkeys(("s", "second", "seconds"), 1.0),
    **dict.fromkeys(("min", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hour", "hours"), 3600.0),
    **dict.fromkeys(("d", "day", "days"), 86400.0),
    **dict.fromkeys(("week", "weeks"), 7 * 86400.0),
}
_COUNTS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_NUMBER = re.compile(r"\s*([-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*(\S.*?)\s*")


@dataclass(frozen=True)
class Quantity:
    """A kind of quantity and the units it may be written in. Used as `Annotated[float, SECONDS]` in dataclasses."""

    name: str
    units: tuple[tuple[str, float], ...]
    example: str

    def parse(self, value: Any) -> Any:
        """The value in SI. Text must carry a unit; a number is taken as SI already (our own JSON files).

        Raises UserError when the text has no number, no unit, or a unit of another kind.
        """
        if not isinstance(value, str):
            return value
        match = _NUMBER.fullmatch(value)
        factor = dict(self.units).get(match[2]) if match else None
        if match is None or factor is None:
            raise UserError(f"'{value}' is not a {self.name}; write it like \"{self.example}\"")
        return float(match[1]) * factor

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        # Imported here so that reading this module does not load pydantic.
        from pydantic_core import PydanticCustomError, core_schema

        def parse(value: Any) -> Any:
            try:
                return self.parse(value)
            except UserError as error:
                raise PydanticCustomError("quantity", "{message}", {"message": str(error)}) from None

        return core_schema.no_info_before_validator_function(parse, handler(source))


def _rates(units: dict[str, float]) -> tuple[tuple[str, float], ...]:
    return tuple((u + "/s", f) for u, f in units.items())


BYTES = Quantity("size", tuple(_SIZES.items()), "80 GB")
BANDWIDTH = Quantity("bandwidth", _rates(_SIZES) + _rates(_BITS), "450 GB/s")
SECONDS = Quantity("time", tuple(_TIMES.items()), "2 us")
DURATION = Quantity("duration", tuple(_DURATIONS.items()), "30 days")
TOKENS = Quantity(
    "number of tokens",
    tuple((unit, f) for p, f in _COUNTS.items() for unit in (p, f"{p} tokens".strip()) if unit),
    "1.5T",
)
# US dollars; the key says of what and for how long.
DOLLARS = Quantity("price", (("USD", 1.0), ("$", 1.0)), "2.50 USD")
FLOPS = Quantity("rate of arithmetic", _rates({p + "FLOP": f for p, f in _PREFIX.items()}), "989 TFLOP/s")


def show_bytes(value: float) -> str:
    """`"1.50 GiB"`: memory is shown in binary units, as allocators report it."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} B"


def show_seconds(value: float) -> str:
    """Three digits with the unit that suits them: `"1.23 s"`, `"45.6 ms"`, `"7.89 us"`."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f} s"
    unit, size = next((u for u in _SHOWN_TIMES if abs(value) >= u[1]), _SHOWN_TIMES[-1])
    digits = value / size
    return f"{digits:.{max(0, 2 - int(math.log10(max(abs(digits), 1))))}f} {unit}"


def show_duration(seconds: float) -> str:
    """Three digits in days, hours or minutes, for what takes longer than a step: `"23.4 days"`."""
    unit, size = duration_unit(seconds)
    return show_seconds(seconds) if size == 1 else f"{_three_digits(seconds / size)} {unit}"


def duration_unit(seconds: float) -> tuple[str, float]:
    """The unit that suits a duration, and its seconds: `("days", 86400.0)`."""
    units = (("days", 86400.0), ("h", 3600.0), ("min", 60.0))
    return next((unit for unit in units if seconds >= unit[1]), ("s", 1.0))


def show_nodes(count: int) -> str:
    """`"1 node"`, `"8 nodes"`."""
    return f"{count} node" if count == 1 else f"{count} nodes"


def show_tokens(tokens: float) -> str:
    """As a user writes it: `"1.5T"`, `"300B"`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if tokens >= size:
            return f"{tokens / size:.4g}{unit}"
    return f"{tokens:,.0f}"


def _three_digits(value: float) -> str:
    return f"{value:,.{max(0, 2 - int(math.log10(max(value, 1.0))))}f}"
