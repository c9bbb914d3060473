"""Quantities: the unit stands in the value, and a bit is an eighth of a byte."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.errors import UserError, nearest
from simulator.units import (
    BANDWIDTH,
    BYTES,
    DOLLARS,
    DURATION,
    FLOPS,
    SECONDS,
    TOKENS,
    Quantity,
    show_bytes,
    show_duration,
    show_seconds,
    show_tokens,
)

amounts = st.floats(min_value=1e-6, max_value=1e6)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (BYTES, "80 GB", 80e9),
        (BYTES, "80 GiB", 80 * 2**30),
        (BYTES, "81559 MiB", 81559 * 2**20),
        (BYTES, "1.5TB", 1.5e12),
        (BANDWIDTH, "450 GB/s", 450e9),
        (BANDWIDTH, "400 Gb/s", 50e9),
        (BANDWIDTH, "3.35 TB/s", 3.35e12),
        (SECONDS, "2 us", 2e-6),
        (SECONDS, "2 µs", 2e-6),
        (SECONDS, "1e-3 s", 1e-3),
        (SECONDS, " 10 ms ", 10e-3),
        (FLOPS, "989 TFLOP/s", 989e12),
        (FLOPS, "1.2 PFLOP/s", 1.2e15),
        (TOKENS, "1.5T", 1.5e12),
        (TOKENS, "300B tokens", 300e9),
        (TOKENS, "5000 tokens", 5e3),
        (DURATION, "30 days", 30 * 86400),
        (DURATION, "2 weeks", 14 * 86400),
        (DURATION, "90 min", 5400),
        (DOLLARS, "2.50 USD", 2.5),
    ],
)
def test_a_text_with_a_unit_becomes_si(kind: Quantity, text: str, value: float) -> None:
    assert kind.parse(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (BYTES, "80"),
        (BYTES, "GB"),
        (BYTES, ""),
        (BYTES, "80 GB/s"),
        (BYTES, "80 gb"),
        (BYTES, "1.2.3 GB"),
        (BANDWIDTH, "450 GB"),
        (BANDWIDTH, "450 Gbps"),
        (SECONDS, "2 minutes"),
        (FLOPS, "989 TFLOPS"),
        (TOKENS, "1 trillion"),
        (DURATION, "a month"),
        (DOLLARS, "2.50 EUR"),
    ],
)
def test_a_text_without_the_right_unit_is_refused_with_an_example(kind: Quantity, text: str) -> None:
    with pytest.raises(UserError) as caught:
        kind.parse(text)
    assert f"'{text}'" in str(caught.value)
    assert kind.name in str(caught.value)
    assert kind.example in str(caught.value)


def test_a_number_is_si_already() -> None:
    assert BYTES.parse(5e10) == 5e10


@given(amounts)
def test_the_letter_case_of_b_is_a_factor_of_eight(amount: float) -> None:
    assert BANDWIDTH.parse(f"{amount!r} GB/s") == pytest.approx(8 * BANDWIDTH.parse(f"{amount!r} Gb/s"))


@given(amounts, st.sampled_from(BANDWIDTH.units))
def test_every_bandwidth_unit_round_trips(amount: float, unit: tuple[str, float]) -> None:
    name, factor = unit
    assert BANDWIDTH.parse(f"{amount!r} {name}") / factor == pytest.approx(amount)


@given(st.floats(min_value=1e-6, max_value=1e6))
def test_shown_seconds_parse_back_to_three_digits(seconds: float) -> None:
    assert SECONDS.parse(show_seconds(seconds)) == pytest.approx(seconds, rel=0.006)


@given(st.floats(min_value=1, max_value=1e15))
def test_shown_bytes_parse_back(size: float) -> None:
    assert BYTES.parse(show_bytes(size)) == pytest.approx(size, rel=0.006, abs=0.6)


def test_quantities_are_shown_as_people_write_them() -> None:
    assert show_bytes(1.5 * 2**30) == "1.50 GiB"
    assert show_bytes(512) == "512 B"
    assert show_seconds(1.234) == "1.23 s"
    assert show_seconds(0.0456) == "45.6 ms"
    assert show_seconds(7.89e-6) == "7.89 us"
    assert show_seconds(0) == "0 s"
    assert show_seconds(math.inf) == "inf s"


def test_a_wrong_word_is_answered_with_the_nearest_or_with_all() -> None:
    assert nearest("lama-3.1-8b", ["gpt2", "llama-3.1-8b"]) == "; did you mean 'llama-3.1-8b'?"
    assert nearest("x", ["fp32", "bf16"]) == "; valid: bf16, fp32"


def test_durations_and_tokens_are_shown_as_they_are_written() -> None:
    shown = [show_duration(seconds) for seconds in (30 * 86400, 1.5 * 86400, 3600, 90, 5)]
    assert shown == ["30.0 days", "1.50 days", "1.00 h", "1.50 min", "5.00 s"]
    assert show_duration(1234 * 86400) == "1,234 days"
    for text in ("1.5T", "300B", "20M"):
        assert show_tokens(TOKENS.parse(text)) == text
