"""What makes a layout complicated, and which of tied ones is recommended."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.axes import RANK_ORDER
from simulator.layout import Layout
from simulator.simplicity import complications, recommended, simplicity, tied

layouts = st.builds(
    Layout,
    tp=st.sampled_from([1, 2, 8]), pp=st.sampled_from([1, 4]), cp=st.sampled_from([1, 2]), ep=st.sampled_from([1, 2]),
    dp_replicate=st.sampled_from([1, 2]), dp_shard=st.sampled_from([1, 4]), zero_stage=st.sampled_from([0, 1, 3]),
    virtual_stages=st.sampled_from([1, 2]), recompute=st.sampled_from(["none", "full"]),
    rank_order=st.sampled_from([RANK_ORDER, "tp-cp-ep-pp-dp"]),
)  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout(dp_replicate=8), ()),
        (Layout(dp_shard=8, zero_stage=1), ()),
        (Layout(dp_shard=8, zero_stage=3), ("ZeRO 3",)),
        (Layout(dp_replicate=2, dp_shard=4, zero_stage=2), ("replicas of shards",)),
        (Layout(tp=2, pp=4), ("tp", "pp")),
        (
            Layout(pp=4, schedule="Interleaved1F1B", virtual_stages=2, recompute="full"),
            ("pp", "virtual stages", "recompute"),
        ),
        (Layout(pp=4, schedule="ZBVZeroBubble", virtual_stages=2), ("pp", "virtual stages", "schedule")),
        (Layout(pp=2, stage_layers=(3, 1)), ("pp", "stage split")),
        (Layout(rank_order="tp-cp-ep-pp-dp"), ("rank order",)),
        (Layout(dp_replicate=8, sync="local_sgd"), ("synchronisation",)),
    ],
)
def test_complications(layout: Layout, expected: tuple[str, ...]) -> None:
    assert complications(layout) == expected


@given(st.lists(layouts, min_size=2, max_size=6, unique=True))
def test_simplicity_is_a_total_order(found: list[Layout]) -> None:
    """Different layouts never compare equal, and one more complication is never simpler."""
    for one, other in itertools.combinations(found, 2):
        assert simplicity(one) != simplicity(other)
        if len(complications(one)) < len(complications(other)):
            assert simplicity(one) < simplicity(other)


def test_the_simplest_of_ties_is_recommended_and_of_equally_simple_ones_the_best() -> None:
    """Within 5 % of 1.00 lie 1.02, 1.04 and 1.05: of the two without any complication the faster one."""
    hybrid, plain, sharded, slow = Layout(tp=2), Layout(dp_replicate=2), Layout(dp_shard=2, zero_stage=1), Layout()
    values = [1.0, 1.04, 1.02, 1.2]
    assert recommended(values, [hybrid, plain, sharded, slow], 0.05) == 2
    # Beyond the band, or without one, the best is.
    assert recommended(values, [hybrid, plain, sharded, slow], 0.01) == 0
    assert recommended(values, [hybrid, plain, sharded, slow], 0.0) == 0


def test_ties_are_counted_from_the_best() -> None:
    assert tied([2.0, 2.1, 2.2, 2.11], 0.05) == [0, 1]
