"""What a published row means: the job and the layout that it ran, and what that leaves open.

A row is what a source states; cells that it leaves empty are filled by rules that hold for all rows of one software
(data/framework.toml). What the source's author will have tuned (the micro batch) is left to the simulator:
`Case.layouts` holds the choices.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from reports.published import DATA, Row
from simulator import presets
from simulator.cluster import ClusterSpec
from simulator.errors import nearest
from simulator.files import read_text, to_dataclass
from simulator.job import Job, Training
from simulator.layout import Layout
from simulator.model import ModelSpec
from simulator.schedules import MULTI_STAGE, SCHEDULES
from simulator.stack import Stack
from simulator.units import BANDWIDTH


class SkippedError(Exception):
    """A row that cannot be predicted; the message says why."""


@dataclass(frozen=True)
class Case:
    """A row as the simulator takes it: the job, and the layouts that the row may mean (one if it states all).

    memory_rank and memory_unit say whose peak a software reports ("first": the first rank's, "": the fullest's), and in
    what, where its code settles what its words leave open."""

    row: Row
    job: Job
    layouts: tuple[Layout, ...]
    assumptions: tuple[str, ...]
    memory_rank: str = ""
    memory_unit: str = ""


def interpret(row: Row) -> Case:
    """The job and the layouts of a row.

    Raises:
        SkippedError: a cell that no rule can fill, or hardware, model or layout that the simulator does not know.
    """
    return _Interpreter(row).case()


class _Interpreter:
    def __init__(self, row: Row) -> None:
        self.row, self.assumptions = row, []  # type: tuple[Row, list[str]]
        self.rules = self._entry("framework", "framework")

    def case(self) -> Case:
        model = self._model()
        cluster, nodes = self._cluster()
        stack = self._stack()
        job = Job(model, cluster, nodes, self._training(), stack)
        layouts = self._layouts(job)
        reasons = [layout.problems(job) for layout in layouts]
        legal = tuple(layout for layout, found in zip(layouts, reasons, strict=True) if not found)
        if not legal:
            raise SkippedError(f"no legal layout: {'; '.join(reasons[0])}" if reasons else "no layout")
        reported = (str(self.rules.get(key, "")) for key in ("memory_rank", "memory_unit"))
        return Case(self.row, job, legal, tuple(self.assumptions), *reported)

    def _entry(self, kind: str, column: str) -> dict[str, Any]:
        """The first entry of a table whose patterns are found in the row."""
        for entry in _table(kind)[kind]:
            where = {column: entry["match"], **entry.get("where", {})}
            if all(re.search(pattern, self.row.text(name), re.I) for name, pattern in where.items()):
                return dict(entry)
        raise SkippedError(f"{column} '{self.row.text(column)}' is not known")

    def _need(self, column: str) -> int:
        value = self.row.count(column)
        if value is None and column in self.rules:
            value = self._assume(column, self.rules[column])
        if value is None:
            raise SkippedError(f"the source does not state {column}")
        return value

    def _assume(self, column: str, value: Any) -> Any:
        self.assumptions.append(f"{column} = {value}")
        return value

    def _model(self) -> ModelSpec:
        row, arch = self.row, self.row.text("arch")
        for entry in _table("model")["model"]:
            if re.search(entry["match"], row.text("model_name"), re.I):
                return self._known_model(_model(entry["preset"]))
        if arch in ("bert", "t5", "bart"):
            return self._of_family(_model(f"{arch}-large"))
        if arch not in ("gpt", "llama", "moe"):
            raise SkippedError(f"arch '{arch}' is not known")
        hidden, heads = self._need("hidden"), self._need("heads")
        llama = arch != "gpt"
        vocab = row.count("vocab") or self._assume("vocab", self.rules.get("vocab", 51200))
        ffn = row.count("ffn") or self._assume("ffn", 4 * hidden)
        model = ModelSpec(
            name=row.text("model_name"),
            family="moe" if arch == "moe" else "llama" if llama else "gpt",
            num_hidden_layers=self._need("layers"),
            hidden_size=hidden,
            num_attention_heads=heads,
            num_key_value_heads=row.count("kv_heads") or heads,
            head_dim=hidden // heads,
            intermediate_size=ffn,
            vocab_size=vocab,
            max_position_embeddings=self._need("seq_len"),
            tie_word_embeddings=not llama,
            norm="rmsnorm" if llama else "layernorm",
            activation="silu" if llama else "gelu_tanh",
            gated_mlp=llama,
            position="rope" if llama else "learned",
            qkv_bias=not llama,
            attention_out_bias=not llama,
            mlp_bias=not llama,
            num_experts=self._need("experts") if arch == "moe" else 0,
            num_experts_per_tok=self._need("topk") if arch == "moe" else 0,
            moe_intermediate_size=ffn if arch == "moe" else 0,
        )
        return self._of_stated_size(model)

    def _known_model(self, model: ModelSpec) -> ModelSpec:
        """A preset with what the row states of it."""
        row = self.row
        return dataclasses.replace(
            model,
            num_hidden_layers=row.count("layers") or model.num_hidden_layers,
            vocab_size=row.count("vocab") or model.vocab_size,
            max_position_embeddings=max(self._need("seq_len"), model.max_position_embeddings),
        )

    def _of_family(self, model: ModelSpec) -> ModelSpec:
        """An encoder, or encoder and decoder, with the row's dimensions and the preset's modules and proportions."""
        row, hidden, heads, layers = self.row, self._need("hidden"), self._need("heads"), self._need("layers")
        encoders = round(layers * model.num_encoder_layers / model.num_hidden_layers)
        return dataclasses.replace(
            self._known_model(model),
            name=row.text("model_name"),
            num_encoder_layers=encoders,
            hidden_size=hidden,
            num_attention_heads=heads,
            num_key_value_heads=row.count("kv_heads") or heads,
            head_dim=hidden // heads,
            intermediate_size=row.count("ffn") or self._assume("ffn", 4 * hidden),
        )

    def _of_stated_size(self, model: ModelSpec) -> ModelSpec:
        """The head length, and whether embedding and head are one, that meet the stated number of parameters best.

        Rows have no column for either. hidden / heads, and what is usual for the family, hold unless another usual
        choice is nearer by more than 1 %.
        """
        stated = self.row.number("params_b")
        if stated is None:
            return model
        choices = [
            dataclasses.replace(model, head_dim=head_dim, tie_word_embeddings=tied)
            for tied in (model.tie_word_embeddings, not model.tie_word_embeddings)
            for head_dim in dict.fromkeys((model.head_dim, 64, 128, 256))
        ]
        off = [abs(choice.parameters() / (stated * 1e9) - 1) for choice in choices]
        best = min(range(len(choices)), key=off.__getitem__)
        if off[0] - off[best] < 0.01:
            return model
        chosen = choices[best]
        if chosen.head_dim != model.head_dim:
            self._assume("head_dim", chosen.head_dim)
        if chosen.tie_word_embeddings != model.tie_word_embeddings:
            self._assume("tie_word_embeddings", chosen.tie_word_embeddings)
        return chosen

    def _cluster(self) -> tuple[ClusterSpec, int]:
        known = self._entry("hardware", "gpu")
        gpus = self._need("n_gpus")
        spec = _cluster(known["cluster"], known["gpu"])
        if "scale_up" in known:
            link = dataclasses.replace(spec.scale_up, bandwidth=BANDWIDTH.parse(known["scale_up"]))
            spec = dataclasses.replace(spec, scale_up=link)
        block = known.get("racks_of", 0)
        if block and gpus % block == 0:
            self._assume("GPUs used of each rack", block)
            spec = dataclasses.replace(spec, scale_up_domain=block)
        stated = self.row.count("gpus_per_node") or spec.gpus_per_node
        per_node = min(gpus, stated)
        if gpus % per_node:
            raise SkippedError(f"n_gpus = {gpus} does not fill nodes of {per_node}")
        if per_node > spec.gpus_per_node:
            raise SkippedError(f"gpus_per_node = {stated}, but {spec.name} has {spec.gpus_per_node}")
        return _with_cards(spec, per_node, _cards(self.row.text("inter_node"))), gpus // per_node

    def _stack(self) -> Stack:
        stack = _stack(self._assume("stack", self.rules["stack"]))
        attention = self.row.text("attention")
        if not attention and "attention" in self.rules:
            attention = self._assume("attention", self.rules["attention"])
        attention = self.rules.get("kernels", {}).get(attention, attention)
        wanted = _ATTENTION.get(attention, ())
        # The run is there: what the stack is able to do is no question.
        return dataclasses.replace(
            stack.without_limits(),
            attention=wanted or stack.attention,
            selective_recompute=self._selective(stack),
            offloaded_blocks=self._offloaded(),
        )

    def _selective(self, stack: Stack) -> dict[str, float]:
        """What selective recomputation means in this row; what it does not say is the stack's own."""
        found: dict[str, float] = {}
        for word, kernels in _SELECTIVE.items():
            if word in self.row.text("recompute_detail"):
                found |= kernels
        return found or stack.selective_recompute

    def _offloaded(self) -> int:
        """Blocks whose activations go to the host, which has no column."""
        found = re.search(r"activation CPU offload of (\d+) layers", self.row.text("notes"))
        return int(found[1]) if found else 0

    def _training(self) -> Training:
        precision = self.row.text("precision") or self._assume("precision", self.rules.get("precision", "bf16"))
        gbs = self.row.count("gbs")
        if gbs is None:
            gbs = self._assume("gbs", self._need("dp") * self._need("mbs"))
        values = {"global_batch_size": gbs, "seq_len": self._need("seq_len"), "precision": precision}
        if self.row.text("arch") == "moe":
            # Published runs of mixtures force balance, or say nothing.
            values["expert_load"] = 1.0
        if re.search(r"\bLoRA\b", self.row.text("model_name")):
            values["peft"] = "lora"
        return to_dataclass(Training, values, "row")

    def _layouts(self, job: Job) -> Iterable[Layout]:
        row, gpus = self.row, job.world_size
        tp, pp, cp, ep = (row.count(c) or 1 for c in ("tp", "pp", "cp", "ep"))
        if gpus % (tp * pp * cp):
            raise SkippedError(f"tp({tp}) * pp({pp}) * cp({cp}) does not divide n_gpus = {gpus}")
        data = gpus // (tp * pp * cp)
        zero = row.count("zero_stage")
        if zero is None:
            zero = self._assume("zero_stage", self.rules.get("zero_stage", 0))
        shard = min(row.count("shard_size") or data, data) if zero else 1
        sp = row.text("sp").lower() in ("yes", "true")
        if not row.text("sp") and tp > 1:
            sp = self._assume("sp", bool(self.rules.get("sp", True)))
        schedule = row.text("schedule") or ("Interleaved1F1B" if (row.count("vpp") or 1) > 1 else "1F1B")
        if schedule in _SCHEDULE_NAMES:
            schedule = self._assume("schedule", _SCHEDULE_NAMES[schedule])
        if schedule not in SCHEDULES:
            raise SkippedError(f"schedule '{schedule}' is not known{nearest(schedule, SCHEDULES)}")
        if pp == 1:
            schedule = "1F1B"
        alone = schedule in job.stack.single_stage_schedules and row.count("vpp") is None
        chunks = self._chunks(job, pp) if schedule in MULTI_STAGE and not alone else 1
        schedule = "1F1B" if schedule == "Interleaved1F1B" and chunks == 1 else schedule
        micro = [row.count("mbs") or 0]
        if micro == [0]:
            share = job.training.global_batch_size // data
            micro = [b for b in (2**i for i in range(5)) if share and share % b == 0] or [1]
            self._assume("mbs", "the fastest that fits")
        recompute = row.text("recompute") or self._assume("recompute", self.rules.get("recompute", "none"))
        # With fewer microbatches than ranks 1F1B, which torch then refuses, is GPipe.
        few = schedule == "1F1B" and job.training.global_batch_size // (data * min(micro)) < pp
        if few:
            schedule = self._assume("schedule", "GPipe")
        return tuple(
            to_dataclass(
                Layout,
                {
                    "dp_replicate": data // shard, "dp_shard": shard, "zero_stage": zero if shard * cp > 1 else 0,
                    "cp": cp, "tp": tp, "pp": pp, "ep": ep, "micro_batch_size": b, "schedule": schedule,
                    "virtual_stages": chunks, "recompute": recompute, "sequence_parallel": sp and tp > 1,
                    "stage_layers": self._stage_layers(job, pp * chunks),
                },
                "row",
            )
            for b in micro
        )  # fmt: skip

    def _chunks(self, job: Job, pp: int) -> int:
        """Stages of each pipeline rank, where the row leaves them out or cuts chunks that have no block."""
        layers, stated = job.model.num_hidden_layers, self.row.count("vpp")
        if stated is None:
            self.assumptions.append("vpp = the fewest that divide the layers, where it is not stated")
            return next((v for v in range(2, 9) if layers % (pp * v) == 0), 2)
        if pp * stated <= layers + 2 * job.stack.bare_ends:
            return stated
        self.assumptions.append("vpp = its largest divisor that leaves a block to every stage")
        return max((v for v in range(1, stated) if not stated % v and pp * v <= layers), default=1)

    def _stage_layers(self, job: Job, stages: int) -> tuple[int, ...] | None:
        """Blocks of each stage. Where they do not divide, embedding and head count as a block each (Llama 3, arXiv
        2407.21783, section 3.3.2); a software that balances by cost counts the head as what it is."""
        layers = job.model.num_hidden_layers
        if stages == 1:
            return None
        if self.rules.get("balances_stages"):
            return _by_cost(job.model, stages)
        for missing in (0, 2, 1):
            if (layers + missing) % stages == 0:
                even = [(layers + missing) // stages] * stages
                even[-1] -= missing > 0
                even[0] -= missing > 1
                bare = missing == 2 and job.stack.bare_ends and stages > 2
                return tuple(even) if missing and (bare or min(even) > 0) else None
        return None


def _by_cost(model: ModelSpec, stages: int) -> tuple[int, ...]:
    """Blocks of each stage such that the stage with the most matmul weights, head included, has the fewest."""
    head = model.vocab_size * model.hidden_size
    block = (model.active_matmul_parameters() - head) / model.num_hidden_layers
    layers = [model.num_hidden_layers // stages + (i < model.num_hidden_layers % stages) for i in range(stages)]

    def cost(i: int) -> float:
        return layers[i] * block + (head if i == stages - 1 else 0)

    while layers[-1] > 1 and cost(stages - 1) - block >= min(map(cost, range(stages))):
        layers[min(range(stages), key=cost)] += 1
        layers[-1] -= 1
    return tuple(layers)


# What is recomputed, by the words of a row.
_SELECTIVE = {
    "core_attn": {"attention": 1.0}, "mla_up_proj": {"q_b": 1.0, "kv_b": 1.0},
    "layernorm": {"layernorm": 1.0, "rmsnorm": 1.0}, "moe_act": {"gated_activation": 1.0},
    "every-2nd-layer": {"matmul": 0.5, "attention": 0.5, "pointwise": 0.5},
}  # fmt: skip

# Kernels by the word of a row, with what stands in for one that has no rate on the device.
_ATTENTION = {
    "unfused": ("unfused",), "eager": ("eager",), "flash1": ("flash1", "flash2"), "flash2": ("flash2", "sdpa"),
    "flash3": ("flash3", "flash2"), "flash4": ("flash4", "cudnn", "flash3", "flash2"),
    "cudnn": ("cudnn", "flash3", "flash2"), "triton": ("triton", "flash1", "flash2"),
}  # fmt: skip
# Schedules that are not torch's, with the nearest of torch's.
_SCHEDULE_NAMES = {"ZB-2p": "ZBVZeroBubble", "V-Half": "ZBVZeroBubble", "V-Min": "ZBVZeroBubble"}


@functools.cache
def _table(name: str) -> dict[str, Any]:
    return tomllib.loads(read_text(DATA / f"{name}.toml", name))


@functools.cache
def _model(name: str) -> ModelSpec:
    return presets.find_model(name)


@functools.cache
def _stack(name: str) -> Stack:
    return presets.find_stack(name, DATA / "stacks")


@functools.cache
def _cluster(name: str, gpu: str) -> ClusterSpec:
    return dataclasses.replace(presets.find_cluster(name), gpu=presets.find_gpu(gpu))


def _cards(text: str) -> tuple[int, float] | None:
    """(cards, bytes per second of each) from `8x HDR 200 Gb/s`, or from `1600 Gbps/node` as one share per GPU."""
    found = [
        (int(number), float(gigabits) * 1e9 / 8)
        for part in text.split(",")
        for number, gigabits in re.findall(r"(\d+)x [^,;]*?(\d+) ?Gb", part)
        if not re.search("Ethernet|Management:|Storage:", part)
    ]
    if found:
        return max(found, key=lambda cards: cards[0] * cards[1])
    node = re.search(r"(?<![\d.])(\d+(?:\.\d+)?) ?([GT])bps/node", text)
    if node:
        return 0, float(node[1]) * {"G": 1e9, "T": 1e12}[node[2]] / 8
    return None


def _with_cards(spec: ClusterSpec, per_node: int, cards: tuple[int, float] | None) -> ClusterSpec:
    if cards and spec.scale_out:
        number, bandwidth = cards if cards[0] else (spec.nics_per_node, cards[1] / spec.nics_per_node)
        spec = dataclasses.replace(
            spec, nics_per_node=number, scale_out=dataclasses.replace(spec.scale_out, bandwidth=bandwidth)
        )
    if per_node < spec.gpus_per_node:
        # A rack's NVLink joins its nodes; a box's ends with the box.
        domain = spec.domain if spec.domain > spec.gpus_per_node else per_node
        spec = dataclasses.replace(spec, gpus_per_node=per_node, scale_up_domain=domain)
    return spec
