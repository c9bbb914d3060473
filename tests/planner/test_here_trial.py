"""`validate here` from end to end, on models so small that their times mean nothing, and what it runs."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from command_line import call

from planner import here_trial
from planner.here_trial import FRESH, Course, ladder, profile_for, slug
from planner.rivals import pinned, planned, rivals, rivals_of_hosts, with_ranks, with_recommended
from planner.search import plan
from runtime import here as runtime_here
from simulator.cluster import AttentionFit, AttentionKernel, CollectiveFit, HostFit, MatmulFit
from simulator.errors import UserError
from simulator.files import write_json
from simulator.hosts import parse_wire
from simulator.job import build_job, read_job
from simulator.presets import user_profile
from simulator.profile import Profile

TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 256, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip


def profile(created: str = "2026-01-01T00:00:00+00:00", **fields: Any) -> Profile:
    rate = AttentionFit(rate=5e10, half_length=100, causal_rate=4e10, causal_half_length=200)
    fits = {
        kind: (CollectiveFit(ranks=2, latency=5e-4, efficiency=0.5),)
        for kind in ("all_reduce", "all_gather", "reduce_scatter", "send_recv")
    }
    found = {"devices": 2, "versions": {}, "kind": "cpu"} | fields
    return Profile(
        name="two processors", created=created, memory=16e9, process_memory=3e8, matmul={"fp32": MatmulFit(8e10)},
        memory_bandwidth=1e10, attention=(AttentionKernel(32, rate, rate),), host=HostFit(1e-5, 2e-5, 5e-5),
        link_bandwidth=3e9, link_latency=1e-4, collectives=fits, concurrency=(1.0, 0.9, 0.6, 0.45), samples=(), **found,
    )  # fmt: skip


@pytest.fixture
def here(folder: Path) -> Path:
    """A folder with a job for a machine of two processors."""
    write_json(folder / "profile.json", profile())
    write_json(folder / "tiny.json", TINY)
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("one two three four " * 500)
    (folder / "job.toml").write_text(
        'model = "./tiny.json"\ncluster = "this-machine"\nprofile = "profile.json"\nnodes = 1\n'
        '[training]\nglobal_batch_size = 4\nseq_len = 32\ndata = "text"\n'
    )
    return folder


# What the planner may choose, so that its recommendation is the rival "1 process" and is not run twice.
ALONE = "[search]\ntp = 1\npp = 1\ndp_replicate = 1\n"


def validate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The document of `validate here job.toml`, two steps a run."""
    fixed = ("job.toml", "--steps", 2, "-o", "out", "--json")
    assert call(monkeypatch, "validate", "here", *fixed, *arguments) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_layouts_run_and_are_compared(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two layouts run; a third never comes through, which is told and keeps nobody from going on."""
    pipeline = pinned(pp=2, schedule="1F1B", virtual_stages=1)
    chosen = {"1 process": pinned(), "pipeline 2": pipeline, "data 2": pinned(dp_replicate=2)}
    monkeypatch.setattr(here_trial, "rivals", lambda _: chosen)
    (here / "job.toml").write_text((here / "job.toml").read_text() + ALONE)
    run_here = runtime_here.run_here

    def run(path: Path, *arguments: Any, **options: Any) -> Any:
        if "data-2" in str(path):
            raise RuntimeError("training failed")
        return run_here(path, *arguments, **options)

    monkeypatch.setattr(runtime_here, "run_here", run)
    document = validate(monkeypatch, capsys, "--rounds", 1)
    assert json.loads((here / "out" / "here.json").read_text()) == document
    assert document["failed"] == ["tiny, data 2: training failed"]
    assert [one["name"] for one in document["layouts"]] == ["1 process", "pipeline 2"]
    for one in document["layouts"]:
        assert one["error"] == pytest.approx(one["predicted"]["step_seconds"] / one["measured"]["step_seconds"] - 1)
        assert len(one["measured"]["rounds"]) == 1 and one["measured"]["peak_memory"] > 1e8
        assert {op["kind"] for op in one["ops"]} >= {"F", "B", "OPTIMIZER", "computation"}
    found = document["layouts"][1]
    assert 0 < found["predicted"]["bubble"] < 1 and 0 < found["measured"]["bubble"] < 1
    assert document["layouts"][0]["predicted"]["bubble"] is None
    assert document["summary"]["count"] == 2 and document["jobs"][0]["recommended"] == "1 process"
    assert document["profile"].startswith("profile profile.json, measured 2026-01-01")
    together = json.loads((here / "out" / "runs" / "pipeline-2" / "measurement.json").read_text())
    assert together["step_seconds"]["median"] == found["measured"]["step_seconds"]
    # The folder is one that the page shows.
    assert call(monkeypatch, "report", "out", "--nodes", "none") == 0
    page = (here / "out" / "report.html").read_text()
    assert "2 layouts: step time off by" in page and "pipeline 2" in page


@pytest.mark.slow
def test_every_layout_runs_in_every_round(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = {"1 process": pinned(), "pipeline 2": pinned(pp=2), "tensor 2": pinned(tp=2)}
    monkeypatch.setattr(here_trial, "rivals", lambda _: chosen)
    (here / "job.toml").write_text((here / "job.toml").read_text() + ALONE)
    document = validate(monkeypatch, capsys, "--rounds", 2)
    for one in document["layouts"]:
        assert one["measured"]["step_seconds"] == pytest.approx(sum(one["measured"]["rounds"]) / 2)
    assert len(document["layouts"]) == 3
    assert len(list((here / "out" / "runs").glob("*/round-*/measurement.json"))) == 6


def test_runs_that_are_not_warm_say_so() -> None:
    assert Course().warning is None
    assert "give --steps 7" in (Course(rounds=1, steps=2, warmup=1).warning or "")


@pytest.mark.slow
def test_two_hosts_run_across_their_link(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ranks on each of two hosts; gloo goes over the link between them."""
    if reason := here_trial.skipped(parse_wire("50 MB/s")):
        pytest.skip(reason)
    monkeypatch.setattr(here_trial, "rivals_of_hosts", lambda _: {"data": pinned(dp_replicate=4)})
    (here / "job.toml").write_text((here / "job.toml").read_text() + "[search]\ndp_replicate = 4\nzero_stage = 0\n")
    document = validate(monkeypatch, capsys, "--link", "50 MB/s", "--rounds", 1)
    assert document["link"] == "50 MB/s"
    (one,) = document["layouts"]
    assert (one["ranks"], one["layout"]["dp_replicate"]) == (4, 4)
    assert len(json.loads((here / "out" / "runs" / "data" / "measurement.json").read_text())["peak_memory"]) == 4


def test_a_link_that_cannot_be_made_is_skipped(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(here_trial, "skipped", lambda wire: "no network namespaces")
    assert call(monkeypatch, "validate", "here", "job.toml", "--link", "50 MB/s") == 0
    assert capsys.readouterr().out == "skipped: no network namespaces\n"
    assert call(monkeypatch, "validate", "here", "job.toml", "--link", "50 MB/s", "--json") == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == "no network namespaces"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("job.toml", "--link", "quick"), "--link 'quick' must be a rate"),
        (("job.toml", "--profile", "none.json"), "none.json"),
        (("other.toml",), "cluster = 'dgx-a100' on 1 nodes cannot run here"),
        (("missing.toml",), "missing.toml"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: tuple[str, ...],
    words: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (here / "other.toml").write_text((here / "job.toml").read_text().replace("this-machine", "dgx-a100"))
    assert call(monkeypatch, "validate", "here", *arguments) == 2
    shown = capsys.readouterr()
    assert words in shown.err and shown.err.count("\n") == 1 and shown.out == ""


def test_every_kind_of_parallelism_is_run() -> None:
    """On two processors: at least twelve layouts on 1, 2 and 4 ranks, with all kinds of pipelines and shards."""
    found = rivals(2)
    ranks = Counter(limits["dp_replicate"][0] * limits["dp_shard"][0] * limits["tp"][0] * limits["pp"][0]
                    for limits in found.values())  # fmt: skip
    assert ranks == {1: 2, 2: 8, 4: 7}
    assert {one for limits in found.values() for one in limits.get("schedule", [])} == {
        "GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble",
    }  # fmt: skip
    assert {one for limits in found.values() for one in limits.get("zero_stage", [])} == {2, 3}
    assert {"data 8", "tensor 8", "data 4 x tensor 2"} <= set(rivals(8))


def test_every_rival_has_a_plan(here: Path) -> None:
    """At least twelve layouts of a job that can be cut along every axis."""
    job = read_job("job.toml")
    plans, missing = planned(job, rivals(2))
    assert len(plans) >= 12 and missing == {"tensor 4": missing["tensor 4"]}
    assert {one.layout.world_size for one in plans.values()} == {1, 2, 4}
    plans, name = with_recommended(plans, plan(job))
    assert name in plans


def test_the_ladder_has_two_rungs(here: Path) -> None:
    (small, chosen), (large, few) = ladder(here / "profile.json")
    assert len(chosen) >= 12 and len(few) >= 3
    assert large.model.parameters() > 9 * small.model.parameters()


def test_a_machine_with_gpus_runs_the_same_jobs_there(here: Path) -> None:
    alone = profile(kind="gpu", devices=1)
    rates = {"fp32": MatmulFit(5e13), "bf16": MatmulFit(5e14)}
    alone = dataclasses.replace(alone, concurrency=(), matmul=rates)
    (small, chosen), _ = ladder(write_json(here / "gpu.json", alone))
    assert (small.stack.name, small.training.precision) == ("layoutwise-cuda", "bf16")
    assert [name for name, limits in chosen.items() if with_ranks(small, limits) is not None] == list(chosen)[:2]


def test_a_layout_with_a_name_already_is_not_run_twice(here: Path) -> None:
    job = read_job("job.toml", ["search.pp=1", "search.tp=1", "search.dp_shard=1", "search.dp_replicate=2"])
    plans, missing = planned(job, {"a": pinned(dp_replicate=2), "b": pinned(dp_replicate=2), "c": pinned(tp=3)})
    assert list(plans) == ["a"] and "no layout of tiny" in missing["c"]
    assert with_recommended(plans, plan(job)) == (plans, "a")
    assert with_recommended({}, plan(job))[1] == "recommended"


def test_a_gpu_carries_one_rank() -> None:
    """Rivals on fewer ranks than there are GPUs run on so many of them; there are none on more."""
    job = build_job({"model": "gpt2", "cluster": "dgx-a100", "nodes": 1, "training": {"global_batch_size": 8}}, "test")
    two = with_ranks(job, pinned(tp=2))
    assert two is not None and two.world_size == 2
    assert with_ranks(job, pinned(tp=16)) is None


def test_hosts_have_layouts_inside_and_across() -> None:
    for limits in rivals_of_hosts(4).values():
        world = 1
        for axis in ("dp_replicate", "dp_shard", "tp", "pp"):
            world *= limits[axis][0]
        assert world == 8


def test_a_fresh_profile_is_taken_and_a_stale_one_is_not(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime import machine, measure

    monkeypatch.setattr(machine, "processors", lambda: 2)
    measured: list[Path] = []

    def pretend(path: Path, report: Any) -> Profile:
        measured.append(path)
        write_json(path, profile(datetime.datetime.now(datetime.UTC).isoformat()))
        return profile()

    monkeypatch.setattr(measure, "measure", pretend)

    def quiet(what: str, done: float) -> None:
        """No progress."""

    assert "measured now, because there was none" in profile_for(None, quiet)[1]
    assert profile_for(None, quiet) == (user_profile(), profile_for(None, quiet)[1])
    assert len(measured) == 1
    now = datetime.datetime.now(datetime.UTC)
    for stale, reason in (
        (profile((now - 2 * FRESH).isoformat()), "more than a day old"),
        (profile(now.isoformat(), versions={"torch": "1.0"}), "no longer 1.0"),
        (profile(now.isoformat(), devices=64), "no longer 64"),
        (profile("yesterday"), "could not be read"),
    ):
        write_json(user_profile(), stale)
        assert reason in profile_for(None, quiet)[1]
    assert len(measured) == 5
    assert profile_for(Path("profile.json"), quiet)[0] == Path("profile.json")
    with pytest.raises(UserError):
        profile_for(Path("nowhere.json"), quiet)


def test_names_become_folders() -> None:
    assert slug("gpt2 data 2 x tensor 2") == "gpt2-data-2-x-tensor-2"
    assert slug("pipeline 2 + data 2") == "pipeline-2-data-2"
    assert slug("gpt-oss ../x") == "gpt-oss-..-x"
    assert slug("pipeline 2, 1F1B") == "pipeline-2-1F1B"
