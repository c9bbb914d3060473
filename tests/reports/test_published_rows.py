"""Published rows: what job and layout a row means, and what stands in for cells that it leaves empty."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from reports.cases import Case, SkippedError, interpret
from reports.published import COLUMNS, Row, published_rows
from simulator.errors import UserError
from simulator.job import Training
from simulator.layout import Layout

MakeRow = Callable[..., Row]


@pytest.fixture(scope="module")
def shipped() -> dict[str, Row]:
    return {row.text("id"): row for row in published_rows()}


@pytest.fixture(scope="module")
def cases(shipped: dict[str, Row]) -> list[Case | tuple[Row, str]]:
    """Every shipped row as it is understood, or why it is not."""

    def understand(row: Row) -> Case | tuple[Row, str]:
        try:
            return interpret(row)
        except (SkippedError, UserError) as reason:
            return row, str(reason)

    return [understand(row) for row in shipped.values()]


def test_a_row_that_states_all(make_row: MakeRow) -> None:
    """16 GPUs = 8 tensor x 2 pipeline ranks leave one replica; 13 B as 12·40·5120² + 51200·5120 and biases."""
    case = interpret(make_row())
    assert case.job.training == Training(32, 2048, "fp16")
    assert (case.job.cluster.name, case.job.nodes, case.job.cluster.gpu.name) == ("dgx-a100", 2, "A100-SXM4-80G")
    model = case.job.model
    assert (model.num_hidden_layers, model.hidden_size, model.head_dim, model.intermediate_size) == (
        40,
        5120,
        128,
        20480,
    )
    assert model.parameters() == pytest.approx(12 * 40 * 5120**2 + 51200 * 5120, rel=0.003)
    assert case.job.stack.attention == ("unfused",)
    assert case.layouts == (
        Layout(tp=8, pp=2, micro_batch_size=2, recompute="selective", sequence_parallel=True),
    )  # fmt: skip
    assert case.assumptions == ("stack = megatron-2021",)


def test_data_ranks_are_what_is_left(make_row: MakeRow) -> None:
    """64 GPUs / (2 tensor · 4 pipeline · 2 context) = 4, all of which shard; in groups of 2 where the row says so."""
    cells = {"n_gpus": "64", "tp": "2", "pp": "4", "cp": "2", "zero_stage": "1", "dp": ""}
    (layout,) = interpret(make_row(**cells)).layouts
    assert (layout.tp, layout.pp, layout.cp, layout.dp_replicate, layout.dp_shard) == (2, 4, 2, 1, 4)
    (layout,) = interpret(make_row(**cells, shard_size="2")).layouts
    assert (layout.dp_replicate, layout.dp_shard) == (2, 2)


def test_a_micro_batch_that_is_not_stated_is_left_open(make_row: MakeRow) -> None:
    """Powers of two up to 16 that divide the 24 sequences of a replica: 1, 2, 4, 8."""
    case = interpret(make_row(mbs="", gbs="24"))
    assert [layout.micro_batch_size for layout in case.layouts] == [1, 2, 4, 8]
    assert "mbs = the fastest that fits" in case.assumptions


def test_chunks_that_are_not_stated_are_the_fewest(make_row: MakeRow) -> None:
    """40 layers on 2 ranks: 2 is the smallest number of chunks that divides 20."""
    case = interpret(make_row(schedule="Interleaved1F1B"))
    assert [layout.virtual_stages for layout in case.layouts] == [2]
    assert "vpp = the fewest that divide the layers, where it is not stated" in case.assumptions


def test_chunks_without_a_block_are_put_together(make_row: MakeRow) -> None:
    """8 chunks on 16 ranks are 128 for 126 blocks, so that two would hold embedding and head alone: 4 are cut, 64 of
    which embedding and head count as a block each: 1, 2 ... 2, 1."""
    case = interpret(make_row(layers="126", n_gpus="128", pp="16", vpp="8", gbs="64", schedule="Interleaved1F1B"))
    (layout,) = case.layouts
    assert (layout.virtual_stages, layout.stage_layers) == (4, (1, *[2] * 62, 1))


def test_a_framework_may_balance_its_stages(make_row: MakeRow) -> None:
    """nanotron counts the head by its weights: the last stage has fewer blocks than the first."""
    (layout,) = interpret(make_row(framework="nanotron", vocab="128256")).layouts
    assert layout.stage_layers is not None and layout.stage_layers[0] > layout.stage_layers[1]
    assert sum(layout.stage_layers) == 40


def test_the_stated_size_decides_what_no_column_says(make_row: MakeRow) -> None:
    """Qwen3-32B: heads of 128 on 5120 / 64 = 80, which only its 32.76 billion parameters tell."""
    cells = {
        "arch": "llama",
        "layers": "64",
        "hidden": "5120",
        "heads": "64",
        "kv_heads": "8",
        "ffn": "25600",
        "vocab": "151936",
    }
    assert interpret(make_row(**cells, params_b="32.76")).job.model.head_dim == 128
    assert interpret(make_row(**cells, params_b="")).job.model.head_dim == 80


def test_export_cards_have_a_slower_nvlink(make_row: MakeRow) -> None:
    assert interpret(make_row(gpu="H800-SXM-80GB")).job.cluster.scale_up.bandwidth == 200e9
    assert interpret(make_row(gpu="H100-SXM-80GB")).job.cluster.scale_up.bandwidth == 450e9


def test_lora_freezes_the_weights(make_row: MakeRow) -> None:
    assert interpret(make_row(model_name="Llama 2 70B LoRA")).job.training.peft == "lora"
    assert interpret(make_row()).job.training.peft == "none"


def test_layers_that_do_not_divide(make_row: MakeRow) -> None:
    """126 + 2 = 128 layers on 16 stages are 8 each, one of which is the embedding or the head: 7, 8 ... 8, 7."""
    (layout,) = interpret(make_row(layers="126", n_gpus="128", pp="16", gbs="64")).layouts
    assert layout.stage_layers == (7, *[8] * 14, 7)


def test_the_stack_follows_the_framework(make_row: MakeRow) -> None:
    stacks = {
        "Megatron-LM 2021": "megatron-2021",
        "NeMo/Megatron-Core (MLPerf v5.1)": "mlperf",
        "Megatron-Bridge/Megatron-Core (NeMo 25.09)": "megatron-bridge-2025",
        "Megatron-Bridge/Megatron-Core (NeMo 26.06)": "megatron-bridge",
        "torchtitan FSDP2": "torchtitan",
        "llm-foundry/Composer FSDP1": "composer",
    }
    assert {name: interpret(make_row(framework=name)).job.stack.name for name in stacks} == stacks
    assert interpret(make_row(framework="torchtitan", compile="yes")).job.stack.name == "torchtitan-compile"


def test_cards_of_the_row_replace_those_of_the_cluster(make_row: MakeRow) -> None:
    """4 cards of 100 Gb/s = 12.5 GB/s each; 800 Gb/s for a node are 12.5 GB/s for each of a DGX's 8."""
    for cell, cards in (("4x EDR 100 Gb/s InfiniBand", 4), ("800 Gbps/node", 8)):
        cluster = interpret(make_row(inter_node=cell)).job.cluster
        assert cluster.scale_out is not None
        assert (cluster.nics_per_node, cluster.scale_out.bandwidth) == (cards, 12.5e9)


def test_throughput_from_the_step(make_row: MakeRow) -> None:
    """32 sequences of 2048 tokens in 4 s on 16 GPUs: 1024 tokens per second and GPU."""
    assert make_row(tokens_per_s_per_gpu="", iter_time_s="4").tokens_per_second_per_gpu == 1024


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"seq_len": ""}, "does not state seq_len"),
        ({"gpu": "TPU v5p"}, "gpu 'TPU v5p' is not known"),
        ({"arch": "diffusion", "model_name": "x"}, "arch 'diffusion' is not known"),
        ({"n_gpus": "24"}, r"tp\(8\) \* pp\(2\) \* cp\(1\) does not divide n_gpus = 24"),
        ({"gbs": "31"}, "no legal layout: global_batch_size = 31"),
    ],
)
def test_what_cannot_be_assumed_is_skipped(make_row: MakeRow, cells: dict[str, str], reason: str) -> None:
    with pytest.raises((SkippedError, UserError), match=reason):
        interpret(make_row(**cells))


def test_a_shipped_row_from_its_paper(shipped: dict[str, Row]) -> None:
    """175B of arXiv 2205.05198, table 5: 8 tensor x 8 pipeline ranks, 3 chunks, batch 64, full recomputation."""
    case = interpret(shipped["korth-0003"])
    assert (case.job.nodes, case.job.world_size, case.job.training.global_batch_size) == (8, 64, 64)
    assert case.job.model.parameters() == pytest.approx(175e9, rel=0.01)
    assert case.layouts == (
        Layout(tp=8, pp=8, schedule="Interleaved1F1B", virtual_stages=3, recompute="full"),
    )  # fmt: skip


def test_every_shipped_row_has_a_source_and_says_how_it_ended(shipped: dict[str, Row]) -> None:
    assert len(shipped) >= 1256
    for row in shipped.values():
        assert row.text("source") and row.text("confidence") in ("high", "medium", "low")
        assert row.text("status") in ("ok", "OOM")
        assert row.ran or row.tokens_per_second_per_gpu is None


def test_every_column_is_documented() -> None:
    words = set(re.findall(r"`(\w+)`", (Path(__file__).parents[2] / "docs" / "files.md").read_text(encoding="utf-8")))
    assert set(COLUMNS) <= words


def test_few_rows_are_skipped(cases: list[Case | tuple[Row, str]]) -> None:
    """At most 5 % of those of which enough is known, each with a reason."""
    counted = [c for c in cases if (c.row if isinstance(c, Case) else c[0]).text("confidence") != "low"]
    skipped = [c for c in counted if not isinstance(c, Case)]
    assert all(reason for _, reason in skipped)
    assert len(skipped) <= 0.05 * len(counted)


def test_rows_of_a_stack_assume_the_same(cases: list[Case | tuple[Row, str]]) -> None:
    """But for what is derived from other cells of the row, and for how full the racks are."""
    derived = {"gbs", "vpp", "head_dim", "ffn", "tie_word_embeddings", "GPUs used of each rack"}
    values: dict[tuple[str, str], set[str]] = defaultdict(set)
    for case in cases:
        if isinstance(case, Case):
            for assumption in case.assumptions:
                column, value = assumption.split(" = ", 1)
                values[case.job.stack.name, column].add(value)
    assert {at: found for at, found in values.items() if len(found) > 1 and at[1] not in derived} == {}


def test_nodes_are_those_of_the_row(make_row: MakeRow) -> None:
    """Four GPUs of a DGX's eight: NVLink ends with them, and 16 GPUs are four nodes. More than it has is no node."""
    job = interpret(make_row(gpus_per_node="4")).job
    assert (job.cluster.gpus_per_node, job.cluster.domain, job.nodes, job.world_size) == (4, 4, 4, 16)
    with pytest.raises(SkippedError, match="gpus_per_node = 16, but dgx-a100 has 8"):
        interpret(make_row(gpus_per_node="16"))


def test_encoders_have_the_dimensions_of_the_row(make_row: MakeRow) -> None:
    """A BERT of 24 blocks, all of them encoders that no mask makes causal; a T5 of 24, half of them."""
    bert = interpret(make_row(arch="bert", layers="24", hidden="1024", heads="16", ffn="4096", vocab="30522")).job.model
    assert (bert.family, bert.num_encoder_layers, bert.causal, bert.hidden_size) == ("bert", 24, False, 1024)
    t5 = interpret(make_row(arch="t5", layers="24", hidden="512", heads="8", ffn="2048")).job.model
    assert (t5.num_encoder_layers, t5.head_dim) == (12, 64)
