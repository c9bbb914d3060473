"""Layouts: the grid of ranks, and a sentence for every cut that is not legal."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.axes import AXES
from simulator.errors import UserError
from simulator.job import Job, read_job
from simulator.layout import Layout
from simulator.layout_text import parse_layout
from simulator.schedules import MULTI_STAGE, SCHEDULES

EXAMPLES = Path(__file__).parents[2] / "examples"
sizes = st.integers(1, 6)
grids = st.builds(Layout, dp_replicate=sizes, dp_shard=sizes, cp=st.integers(1, 3), tp=sizes, pp=sizes)


@given(grids, st.data())
def test_rank_and_coordinates_are_each_others_inverse(layout: Layout, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, layout.world_size - 1))
    coordinates = layout.coordinates(rank)
    assert layout.rank(**coordinates) == rank
    assert all(0 <= coordinates[axis] < getattr(layout, axis) for axis in AXES)


@given(grids)
def test_every_rank_has_coordinates_of_its_own(layout: Layout) -> None:
    seen = {tuple(layout.coordinates(rank).values()) for rank in range(layout.world_size)}
    assert len(seen) == layout.world_size


def test_tensor_ranks_are_neighbours_and_pipeline_ranks_are_farthest() -> None:
    layout = Layout(tp=2, dp_replicate=2, pp=2)
    assert [layout.coordinates(rank)["tp"] for rank in range(8)] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert [layout.coordinates(rank)["pp"] for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


@given(grids, st.sets(st.sampled_from(AXES), min_size=1))
def test_the_translates_of_a_group_partition_the_world(layout: Layout, axes: set[str]) -> None:
    """Moving the group that holds the first rank to every place of the other axes covers each rank once."""
    group = layout.group(*axes)
    origins = [r for r in range(layout.world_size) if all(layout.coordinates(r)[axis] == 0 for axis in axes)]
    covered = sorted(origin + member for origin in origins for member in group)
    assert covered == list(range(layout.world_size))


@given(grids, st.sampled_from(AXES))
def test_a_group_differs_in_its_axis_alone(layout: Layout, axis: str) -> None:
    group = layout.group(axis)
    assert len(group) == getattr(layout, axis)
    others = [{k: v for k, v in layout.coordinates(rank).items() if k != axis} for rank in group]
    assert all(other == others[0] for other in others)


ORDERS = ("tp-cp-ep-pp-dp", "tp-pp-dp", "tp-pp-cp-ep-dp", "ep-dp-tp-cp-pp", "pp-dp-ep-cp-tp")


@given(grids, st.sampled_from(ORDERS), st.sampled_from(AXES))
def test_every_rank_order_is_a_numbering(layout: Layout, order: str, axis: str) -> None:
    """Ranks and coordinates are inverse, and a group differs in its axis alone, whatever the order."""
    layout = dataclasses.replace(layout, rank_order=order)
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert [layout.rank(**place) for place in places] == list(range(layout.world_size))
    others = [{k: v for k, v in places[rank].items() if k != axis} for rank in layout.group(axis)]
    assert len(others) == getattr(layout, axis)
    assert all(other == others[0] for other in others)


def test_the_innermost_axis_counts_first() -> None:
    """Two by two by two: tp of the first order are neighbours, stages of the second, replicas of the third."""
    grid = Layout(tp=2, dp_replicate=2, pp=2)
    assert grid.group("tp") == (0, 1)
    stages_inside = dataclasses.replace(grid, rank_order="tp-cp-ep-pp-dp")
    assert (stages_inside.group("pp"), stages_inside.group("dp_replicate")) == ((0, 2), (0, 4))
    replicas_inside = dataclasses.replace(grid, rank_order="ep-dp-tp-cp-pp")
    assert (replicas_inside.group("dp_replicate"), replicas_inside.group("tp")) == ((0, 1), (0, 2))
    assert replicas_inside.group("tp", pp_rank=1) == (4, 6)


def test_a_group_of_two_axes_on_the_last_stage() -> None:
    layout = Layout(tp=2, dp_shard=2, dp_replicate=2, pp=2)
    assert layout.group("dp_shard", "dp_replicate", pp_rank=1) == (8, 10, 12, 14)


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 200))
def test_layers_are_spread_evenly_and_none_is_lost(pp: int, virtual_stages: int, layers: int) -> None:
    shares = Layout(pp=pp, virtual_stages=virtual_stages).layers_per_stage(layers)
    assert len(shares) == pp * virtual_stages
    assert sum(shares) == layers
    assert max(shares) - min(shares) <= 1
    if layers >= len(shares) or pp == 1:
        assert list(shares) == sorted(shares, reverse=True)


def test_named_stages_are_kept() -> None:
    assert Layout(pp=4).layers_per_stage(10) == (3, 3, 2, 2)
    assert Layout(pp=2, stage_layers=(7, 3)).layers_per_stage(10) == (7, 3)


def test_stages_loop_over_the_ranks() -> None:
    assert Layout(pp=2, virtual_stages=3).stages_of(1) == (1, 3, 5)


def changed(job: Job, **changes: Any) -> Job:
    """A job with fields of its model, stack or training replaced: `stack_zero_stages=(3,)`."""
    for name, value in changes.items():
        part, _, field = name.partition("_")
        job = dataclasses.replace(job, **{part: dataclasses.replace(getattr(job, part), **{field: value})})
    return job


EIGHT_EXPERTS = {"model_num_experts": 8, "model_num_experts_per_tok": 2, "model_moe_intermediate_size": 64}
ALL_SYNCS = {"stack_syncs": ("all_reduce", "reduce_broadcast", "parameter_server", "local_sgd")}
PROBLEMS: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    # the layout, changes to the job, key words of the sentence
    ({"tp": 0}, {}, ["tp = 0", "at least 1"]),
    ({"rank_order": "tp-pp", "dp_replicate": 16}, {}, ["rank_order = 'tp-pp'", "once each"]),
    ({"rank_order": "tp-dp-dp-pp"}, {}, ["rank_order = 'tp-dp-dp-pp'", "once each"]),
    ({"rank_order": "tp-dp-pp-xp"}, {}, ["rank_order = 'tp-dp-pp-xp'", "once each"]),
    ({"rank_order": "tp-cp-ep-pp-dp"}, {"stack_fixed_rank_order": True}, ["no other rank_order"]),
    ({"micro_batch_size": -1}, {}, ["micro_batch_size = -1", "at least 1"]),
    ({"dp_replicate": 16, "sync": "local_sgd", "sync_interval": 0}, {}, ["sync_interval = 0", "from 1 to"]),
    ({"dp_replicate": 16, "sync": "parameter_server", "servers": -1}, {}, ["servers = -1", "at least 0"]),
    ({"dp_replicate": 16, "sync": "parameter_server", "staleness": -1}, {}, ["staleness = -1", "none for no bound"]),
    ({"dp_replicate": 16, "sync": "parameter_server"}, ALL_SYNCS, ["needs servers of at least 1"]),
    ({"dp_replicate": 16, "sync": "parameter_server", "servers": 17}, ALL_SYNCS, ["servers = 17", "16 ranks"]),
    ({"dp_replicate": 16, "servers": 2}, {}, ["servers = 2 needs sync = 'parameter_server', not 'all_reduce'"]),
    ({"dp_replicate": 16, "staleness": None}, {}, ["staleness = none needs sync = 'parameter_server'"]),
    ({"dp_replicate": 16, "sync_interval": 4}, {}, ["sync_interval = 4 needs sync = 'local_sgd'"]),
    ({"dp_replicate": 16, "outer_optimizer": "nesterov"}, {}, ["outer_optimizer = 'nesterov' needs sync"]),
    ({"dp_shard": 16, "zero_stage": 3, "sync": "local_sgd"}, ALL_SYNCS, ["needs dp_replicate > 1"]),
    ({"dp_replicate": 16, "sync": "local_sgd"}, {}, ["stack megatron-core has no sync = 'local_sgd'"]),
    ({"dp_replicate": 16, "sync": "local_sgd"}, ALL_SYNCS | {"training_peft": "lora"}, ["not peft = 'lora'"]),
    (
        {"dp_replicate": 16, "ep": 2, "sync": "reduce_broadcast"},
        EIGHT_EXPERTS | ALL_SYNCS,
        ["ep = 2 needs the experts inside a replica"],
    ),
    ({"dp_replicate": 8}, {}, ["dp_replicate(8)", "= 8 ranks", "2 nodes have 16"]),
    ({"dp_replicate": 32}, {}, ["= 32 ranks", "2 nodes have 16"]),
    ({"dp_replicate": 64}, {"cluster_oversubscribe": 2.0}, ["64 ranks", "more than the 32"]),
    ({"dp_shard": 16}, {}, ["zero_stage = 0", "dp_replicate"]),
    ({"dp_replicate": 16, "zero_stage": 1}, {}, ["zero_stage = 1", "dp_shard > 1"]),
    ({"dp_replicate": 8, "cp": 2}, {"stack_context_parallel": ""}, ["no context parallelism", "cp = 2"]),
    ({"dp_replicate": 8, "cp": 2}, {"training_seq_len": 8190}, ["cp = 2", "2 * cp = 4 must divide seq_len = 8190"]),
    (
        {"dp_replicate": 1, "cp": 2, "tp": 8, "sequence_parallel": True},
        {"training_seq_len": 8208},
        ["2 * cp * tp = 32 must divide seq_len = 8208"],
    ),
    ({"dp_replicate": 8, "cp": 2}, {"model_num_encoder_layers": 32}, ["decoder-only"]),
    (
        {"dp_replicate": 1, "cp": 16},
        {"stack_context_parallel": "ulysses", "model_num_attention_heads": 24},
        ["tp(1) * cp(16) must divide num_attention_heads = 24"],
    ),
    ({"dp_replicate": 8, "cp": 2}, {"model_mamba_num_heads": 8}, ["scan of Mamba blocks"]),
    ({"dp_replicate": 16}, {"model_mamba_num_heads": 8, "stack_elementwise": {}}, ["no kernels for Mamba"]),
    (
        {"dp_replicate": 2, "tp": 8},
        {"model_mamba_num_heads": 64, "model_mamba_n_groups": 4},
        ["tp = 8 must divide mamba_n_groups = 4"],
    ),
    ({"dp_replicate": 16, "ep": 2}, {}, ["ep = 2", "has no experts"]),
    ({"dp_replicate": 16, "ep": 2}, EIGHT_EXPERTS | {"stack_expert_dispatch": ""}, ["no expert parallelism"]),
    ({"dp_replicate": 16, "ep": 16}, EIGHT_EXPERTS, ["ep = 16 must divide num_experts = 8"]),
    ({"dp_replicate": 2, "tp": 8, "ep": 2}, EIGHT_EXPERTS, ["ep = 2", "needs sequence_parallel"]),
    (
        {"dp_replicate": 2, "tp": 8, "ep": 4, "sequence_parallel": True},
        EIGHT_EXPERTS | {"stack_expert_tensor_parallel": True},
        ["ep = 4 times tp must divide dp_replicate(2) * cp(1) * tp(8) = 16"],
    ),
    (
        {"dp_replicate": 8, "dp_shard": 2, "ep": 4, "zero_stage": 1},
        EIGHT_EXPERTS,
        ["ep = 4 must divide dp_shard(2) * cp(1) * tp(1) = 2"],
    ),
    (
        {"dp_replicate": 16, "micro_batch_size": 3},
        {},
        ["global_batch_size = 512", "dp(16) * micro_batch_size(3) = 48"],
    ),
    ({"dp_replicate": 16, "sequence_parallel": True}, {}, ["sequence_parallel", "tp > 1"]),
    ({"dp_replicate": 1, "tp": 16}, {}, ["tp = 16", "num_key_value_heads = 8", "nearest smaller tp is 8"]),
    ({"dp_replicate": 2, "tp": 8}, {"model_num_attention_heads": 36}, ["tp = 8", "num_attention_heads = 36", "is 6"]),
    ({"dp_replicate": 2, "tp": 8}, {"model_intermediate_size": 100}, ["tp = 8", "intermediate_size = 100", "is 5"]),
    ({"dp_replicate": 2, "tp": 8}, {"model_hidden_size": 4100}, ["tp = 8", "hidden_size = 4100", "is 5"]),
    (
        {"dp_replicate": 2, "tp": 8},
        {"model_num_experts": 8, "model_moe_intermediate_size": 9},
        ["tp = 8", "moe_intermediate_size = 9", "is 3"],
    ),
    (
        {"dp_replicate": 2, "tp": 8, "sequence_parallel": True},
        {"training_seq_len": 1001},
        ["tp = 8", "seq_len = 1001"],
    ),
    ({"dp_replicate": 1, "pp": 16, "schedule": "DualPipe"}, {}, ["'DualPipe' is not known", "did you mean"]),
    (
        {"dp_replicate": 4, "pp": 4, "virtual_stages": 16, "schedule": "Interleaved1F1B"},
        {},
        ["pp(4) * virtual_stages(16) = 64 stages", "32 layers"],
    ),
    ({"dp_replicate": 8, "pp": 2, "stage_layers": (16, 15)}, {}, ["[16, 15]", "2 stages that sum to 32"]),
    ({"dp_replicate": 8, "pp": 2, "stage_layers": (32,)}, {}, ["[32]", "2 stages"]),
    (
        {"dp_replicate": 8, "pp": 2, "stage_layers": (33, -1)},
        {},
        ["[33, -1]", "every stage needs a layer"],
    ),
    ({"dp_replicate": 8, "pp": 2, "virtual_stages": 2}, {}, ["1F1B has one stage per rank", "virtual_stages = 2"]),
    ({"dp_replicate": 8, "pp": 2, "schedule": "Interleaved1F1B"}, {}, ["virtual_stages > 1 and pp > 1"]),
    ({"dp_replicate": 16, "virtual_stages": 2, "schedule": "Interleaved1F1B"}, {}, ["virtual_stages > 1 and pp > 1"]),
    (
        {"dp_replicate": 2, "pp": 8},
        {"training_global_batch_size": 8},
        ["global_batch_size(8) / (dp(2) * micro_batch_size(1)) = 4 microbatches", "1F1B over pp = 8 needs at least 8"],
    ),
    (
        {"dp_replicate": 4, "pp": 4, "virtual_stages": 2, "schedule": "Interleaved1F1B"},
        {"training_global_batch_size": 52},
        ["= 13 microbatches", "Interleaved1F1B cannot split into 3 equal rounds"],
    ),
    (
        {"dp_replicate": 4, "pp": 4, "virtual_stages": 2, "schedule": "InterleavedZeroBubble"},
        {"training_global_batch_size": 52},
        ["= 13 microbatches", "InterleavedZeroBubble cannot split into 3 equal rounds"],
    ),
    (
        {"dp_replicate": 4, "pp": 4, "virtual_stages": 2, "schedule": "DualPipeV"},
        {"training_global_batch_size": 28},
        ["= 7 microbatches", "DualPipeV over 2 * pp(4) stages needs at least 8"],
    ),
    (
        {"dp_replicate": 4, "pp": 4, "virtual_stages": 4, "schedule": "ZBVZeroBubble"},
        {},
        ["ZBVZeroBubble puts 2 stages on each rank", "virtual_stages = 4 must be 2"],
    ),
    (
        {"dp_replicate": 4, "pp": 4, "virtual_stages": 2, "schedule": "ZBVZeroBubble", "recompute": "full"},
        {},
        ["recompute = 'full' must be 'none' with ZBVZeroBubble", "again for each of its weights"],
    ),
    ({"dp_replicate": 8, "pp": 2, "schedule": "LoopedBFS"}, {}, ["virtual_stages > 1 and pp > 1"]),
    ({"dp_replicate": 16}, {"stack_model_families": ("gpt",)}, ["cannot train the llama family"]),
    (
        {"dp_replicate": 16},
        {"stack_lacks": ("latent_attention",), "model_kv_lora_rank": 512},
        ["cannot train latent attention yet (kv_lora_rank = 512)"],
    ),
    (
        {"dp_replicate": 16},
        {"stack_lacks": ("attention_sinks",), "model_attention_sinks": True},
        ["cannot train attention sinks"],
    ),
    (
        {"dp_replicate": 2, "tp": 8},
        EIGHT_EXPERTS | {"stack_expert_alignment": 8, "model_moe_intermediate_size": 96},
        ["experts of moe_intermediate_size = 12 on a rank, which must be a multiple of 8"],
    ),
    (
        {"dp_replicate": 2, "tp": 8, "sequence_parallel": True, "ep": 8},
        EIGHT_EXPERTS | {"model_num_shared_experts": 1, "model_moe_intermediate_size": 100},
        ["tp = 8 must divide num_shared_experts * moe_intermediate_size = 100"],
    ),
    (
        {"dp_replicate": 8, "cp": 2},
        {"stack_context_precisions": ("bf16",), "training_precision": "fp32"},
        ["no context parallelism in fp32: cp = 2 must be 1", "['bf16']"],
    ),
    ({"dp_shard": 16, "zero_stage": 2}, {"stack_zero_stages": (1, 3)}, ["no zero_stage 2", "[1, 3]"]),
    (
        {"dp_shard": 8, "pp": 2, "zero_stage": 3},
        {"stack_zero_stages": (1, 3), "stack_pipeline_zero_stages": (1,)},
        ["no zero_stage 3 under a pipeline", "pp = 2"],
    ),
    ({"dp_replicate": 16, "recompute": "full"}, {"stack_recompute": ("none",)}, ["no recompute = 'full'", "['none']"]),
    ({"dp_replicate": 16, "schedule": "GPipe"}, {"stack_schedules": ("1F1B",)}, ["no schedule GPipe", "['1F1B']"]),
    (
        {"dp_replicate": 2, "tp": 8, "sequence_parallel": True},
        {"stack_sequence_parallel": ""},
        ["no sequence_parallel"],
    ),
    ({"dp_replicate": 2, "tp": 8}, {"stack_sequence_parallel": "always"}, ["with sequence_parallel = true only"]),
    (
        {"dp_replicate": 2, "tp": 8},
        {"stack_pads_vocabulary": False, "model_vocab_size": 50257},
        ["tp = 8 must divide vocab_size = 50257"],
    ),
    (
        {"dp_replicate": 8, "pp": 2},
        {"stack_ties_across_stages": False, "model_tie_word_embeddings": True},
        ["tie_word_embeddings", "pp > 1"],
    ),
    (
        {"dp_replicate": 2, "dp_shard": 8, "zero_stage": 3},
        {"stack_hybrid_shard": False},
        ["cannot replicate sharded", "dp_replicate and dp_shard"],
    ),
]


@pytest.fixture
def job(make_job: Any) -> Job:
    """Llama-3.1-8B on 16 GPUs with a stack that can do everything, so that a test names what it takes away."""
    able = {
        "stack_zero_stages": (1, 2, 3), "stack_pipeline_zero_stages": (1, 2, 3), "stack_model_families": (),
        "stack_recompute": ("none", "selective", "full"), "stack_schedules": SCHEDULES,
        "stack_sequence_parallel": "optional", "stack_hybrid_shard": True, "stack_pads_vocabulary": True,
        "stack_ties_across_stages": True,
    }  # fmt: skip
    return changed(make_job(nodes=2, seq_len=8192, global_batch_size=512), **able)


@pytest.mark.parametrize(("layout", "changes", "words"), PROBLEMS)
def test_what_is_illegal_is_said_with_its_arithmetic(
    job: Job, layout: dict[str, Any], changes: dict[str, Any], words: list[str]
) -> None:
    found = Layout(**layout).problems(changed(job, **changes))
    assert any(all(word in sentence for word in words) for sentence in found), found


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp_replicate=16),
        Layout(dp_shard=16, zero_stage=3),
        Layout(dp_replicate=2, dp_shard=8, zero_stage=2),
        Layout(tp=8, dp_shard=2, zero_stage=1, sequence_parallel=True),
        Layout(tp=8, pp=2, sequence_parallel=True, recompute="selective"),
        Layout(dp_replicate=4, pp=4, virtual_stages=2, schedule="Interleaved1F1B"),
        Layout(dp_replicate=8, pp=2, stage_layers=(17, 15), schedule="GPipe"),
    ],
)
def test_a_legal_layout_has_no_problems(job: Job, layout: Layout) -> None:
    assert layout.problems(job) == []


def test_ranks_may_go_unused_on_an_oversubscribed_machine(job: Job) -> None:
    shared = changed(job, cluster_oversubscribe=2.0)
    assert Layout(dp_replicate=2).problems(shared) == []
    assert Layout(dp_replicate=32).problems(shared) == []


def test_the_words_that_a_layout_shows_are_the_words_it_is_read_from(job: Job) -> None:
    for layout in (
        Layout(tp=8, pp=2, sequence_parallel=True, recompute="full", micro_batch_size=2),
        Layout(dp_replicate=8, pp=2, stage_layers=(17, 15)),
        Layout(dp_replicate=4, pp=4, virtual_stages=2, schedule="Interleaved1F1B"),
    ):
        assert parse_layout(layout.short(), job) == layout
    assert Layout().short() == "one process"


def test_ranks_not_named_go_to_data_parallelism_as_the_stack_shards(job: Job) -> None:
    sharding = changed(job, stack_default_zero_stage=1)
    assert parse_layout("tp=4", sharding) == Layout(tp=4, dp_shard=4, zero_stage=1, sequence_parallel=True)
    plain = changed(job, stack_default_zero_stage=0)
    assert parse_layout("tp=4 pp=2", plain) == Layout(tp=4, pp=2, dp_replicate=2, sequence_parallel=True)
    assert parse_layout("tp=8 pp=2", sharding).zero_stage == 0
    assert parse_layout("dp_shard=16", plain).zero_stage == 3


def test_virtual_stages_and_schedules_of_several_stages_imply_each_other(job: Job) -> None:
    assert parse_layout("pp=4 virtual_stages=2", job).schedule == "Interleaved1F1B"
    for name in MULTI_STAGE:
        layout = parse_layout(f"pp=4 schedule={name}", job)
        assert layout.virtual_stages == 2 and not layout.problems(job)


def test_commas_and_spaces_both_separate_words(job: Job) -> None:
    assert parse_layout("tp=4, pp=2", job) == parse_layout("tp=4 pp=2", job)
    assert parse_layout("pp=2 stage_layers=17,15", job).stage_layers == (17, 15)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tp", ["'tp'", "field=value"]),
        ("tp=", ["'tp='", "field=value"]),
        ("tensor=8", ["'tensor'", "unknown field"]),
        ("micro_batch=2", ["did you mean 'micro_batch_size'"]),
        ("tp=eight", ["tp = 'eight'", "integer"]),
        ("schedule=1f1b", ["'1f1b'", "1F1B"]),
        ("zero_stage=4", ["zero_stage", "'4'", "0, 1, 2, 3"]),
        ("sequence_parallel=yes", ["'yes'", "true or false"]),
        ("stage_layers=a,b", ["stage_layers"]),
    ],
)
def test_a_word_that_is_wrong_is_the_users_error(job: Job, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_layout(text, job)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_ends_of_a_pipeline_may_hold_the_embedding_and_the_head_alone() -> None:
    """llama-3.1-405b as Meta trained it (arXiv 2407.21783, section 3.3.2): 126 layers in 16 · 8 = 128 stages."""
    job = read_job(EXAMPLES / "llama-405b-16384-h100.toml")
    layout = parse_layout("tp=8 pp=16 virtual_stages=8", job)
    assert layout.layers_per_stage(126) == (0, *[1] * 126, 0)
    assert not layout.problems(job)
    more = dataclasses.replace(layout, virtual_stages=9)
    assert "144 stages, but the model has 126 layers" in more.problems(job)[0]
