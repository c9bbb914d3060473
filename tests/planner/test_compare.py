"""layoutwise compare, and the planner where [search] names other ways to keep replicas together."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from command_line import call

from planner.compare import compare, comparison_json
from planner.explain import Explanation, mathematics, remarks
from planner.export import TARGETS, export
from planner.plan import read_plan, write_plan
from planner.search import plan
from planner.space import candidates
from simulator.errors import UserError
from simulator.job import Job, build_job, read_job
from simulator.layout_text import parse_fields, parse_layout
from simulator.simulate import simulate
from simulator.sync_rules import changes_mathematics

EXAMPLE = Path(__file__).parents[2] / "examples" / "office-10gbe.toml"
SMALL = {"tp": [1], "pp": [1], "micro_batch_size": [4], "recompute": ["none"], "zero_stage": [0]}


def job(search: dict[str, object] | None = None) -> Job:
    return build_job(
        {
            "model": "gpt2", "cluster": "workstation-4x4090", "nodes": 2, "search": search or {},
            "training": {"stack": "layoutwise-cuda", "global_batch_size": 64, "seq_len": 1024},
        },
        "job 'test'",
    )  # fmt: skip


def test_the_example_is_compared_in_every_way() -> None:
    found = compare(read_job(EXAMPLE), parse_fields("dp_shard=4 dp_replicate=4 zero_stage=2"))
    rows = {way.name: way for way in found.ways}
    assert set(rows) == {
        "all-reduce", "centre: reduce, broadcast", "servers, synchronous", "servers, at most 4 steps apart",
        "servers, asynchronous", "local SGD, 50 steps", "DiLoCo, 50 steps",
    }  # fmt: skip
    steps = {name: way.prediction.step_seconds for name, way in rows.items() if way.prediction}
    assert steps["servers, asynchronous"] < steps["servers, at most 4 steps apart"] < steps["servers, synchronous"]
    assert steps["local SGD, 50 steps"] < steps["all-reduce"] < steps["centre: reduce, broadcast"]
    for way in rows.values():
        assert way.prediction is not None and way.prediction.synchronisation is not None
        # An exchange may be hidden by computing, waited for or overlapped, but not left out of the step.
        assert way.prediction.step_seconds > way.bound
        assert way.p95 > way.prediction.step_seconds


def test_sharded_replicas_are_a_row_where_nothing_else_is_sharded() -> None:
    names = [way.name for way in compare(job(), {}, "all_reduce").ways]
    assert names == ["all-reduce", "all-gather (ZeRO-3)"]


def test_json_has_every_row_and_the_textbook() -> None:
    given = {"servers": 1, "staleness": 2, "sync_interval": 7}
    document = json.loads(json.dumps(comparison_json(compare(job(), given))))
    assert document["replicas"] == 8
    assert [row["name"] for row in document["textbook"]][:2] == ["ring", "double tree"]
    by_name = {row["name"]: row for row in document["ways"]}
    bounded = by_name["servers, at most 2 steps apart"]
    assert bounded["layout"]["servers"] == 1 and bounded["layout"]["staleness"] == 2
    assert bounded["changes_mathematics"] and not by_name["servers, synchronous"]["changes_mathematics"]
    assert {"step_seconds", "p95", "exchange_bound", "memory", "synchronisation"} <= bounded.keys()
    assert by_name["servers, asynchronous"]["layout"]["staleness"] is None


def test_one_row_says_what_simulate_says() -> None:
    way = compare(job(), {}, "local_sgd").ways[0]
    assert way.prediction == simulate(job(), way.layout)


@pytest.mark.parametrize(
    ("text", "syncs", "words"),
    [
        ("", "all_reduce,gossip", ["--sync 'gossip'", "parameter_server"]),
        ("staleness=some", "all", ["staleness = 'some'", "integer or none"]),
        ("dp_replicate=3", "all", ["cannot run this job in any way"]),
    ],
)
def test_what_cannot_be_compared_is_a_sentence(text: str, syncs: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        compare(job(), parse_fields(text), syncs)
    for word in words:
        assert word in str(error.value)


def test_only_named_ways_are_tried() -> None:
    assert {layout.sync for layout in candidates(job(SMALL))} == {"all_reduce"}
    named = SMALL | {"sync": ["all_reduce", "parameter_server"], "staleness": [0, 3, "none"], "servers": [1, 2]}
    tried = {(layout.sync, layout.servers, layout.staleness) for layout in candidates(job(named))}
    served = {("parameter_server", servers, staleness) for servers in (1, 2) for staleness in (0, 3, None)}
    assert tried == served | {("all_reduce", 0, 0)}


def test_a_field_of_a_way_that_is_not_named_is_an_error() -> None:
    with pytest.raises(UserError, match=r"search\.sync_interval says nothing without 'local_sgd' in search\.sync"):
        job({"sync_interval": [8]})


def test_a_plan_that_changes_the_mathematics_says_so_everywhere(tmp_path: Path) -> None:
    found = plan(job(SMALL | {"sync": ["all_reduce", "local_sgd"], "sync_interval": [20]}))
    assert found.layout.sync == "local_sgd" and found.baseline.layout.sync == "all_reduce"
    assert found.best.synchronisation is not None and found.best.synchronisation.changes_mathematics
    assert "agree every 20 steps only" in mathematics(found.best)
    assert any("changes the mathematics" in words for words in remarks(Explanation([("recommended", found.best)], {})))
    read = read_plan(write_plan(found, tmp_path / "plan.json"))
    assert read.best == found.best
    for target in TARGETS:
        with pytest.raises(UserError, match="sync = 'local_sgd': its replicas all-reduce their gradients"):
            export(read, target)


def test_a_plan_of_the_usual_kind_says_nothing_of_it() -> None:
    found = plan(job(SMALL))
    assert found.best.synchronisation is None and mathematics(found.best) == ""
    assert not changes_mathematics(found.layout)


def test_stragglers_keep_the_certificate() -> None:
    """The best layout that the search finds is the best of all that are legal, also where a rank is fast."""
    limited = SMALL | {"micro_batch_size": [2, 4], "sync": ["all_reduce", "parameter_server"], "staleness": ["none"]}
    told = dataclasses.replace(job(limited), stragglers=dataclasses.replace(job().stragglers, jitter="normal 10 %"))
    told = dataclasses.replace(told, stragglers=dataclasses.replace(told.stragglers, factors={"0": 0.5}, steps=30))
    legal = [layout for layout in candidates(told) if not layout.problems(told)]
    best = min(simulate(told, layout).step_seconds for layout in legal)
    assert plan(told).best.step_seconds == pytest.approx(best)


@pytest.mark.parametrize("text", ["sync=parameter_server servers=2 staleness=none", "sync=local_sgd sync_interval=8"])
def test_text_and_layout_are_the_same(text: str) -> None:
    layout = parse_layout(text, job())
    assert parse_layout(layout.short(), job()) == layout and text in layout.short()


def test_a_comparison_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from planner.cli import main

    monkeypatch.setattr("sys.argv", ["layoutwise", "compare", str(EXAMPLE), "--sync", "all_reduce,parameter_server"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    shown = capsys.readouterr().out
    for words in ("stragglers: factors {'12-15': 1.4}", "servers, asynchronous *", "double tree", "2(n-1)/n M/B"):
        assert words in shown


def test_ways_that_a_stack_lacks_are_named_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    from planner.show import print_comparison

    where = build_job(
        {"model": "gpt2", "cluster": "workstation-4x4090", "nodes": 1, "training": {"stack": "torchtitan"}},
        "job 'test'",
    )
    found = compare(where, {"micro_batch_size": 4})
    assert [way.name for way in found.ways if way.prediction] == ["all-reduce", "all-gather (ZeRO-3)"]
    print_comparison(found, where)
    assert "local SGD, 50 steps: stack torchtitan has no sync = 'local_sgd'" in capsys.readouterr().out


def test_flags_of_another_framework_are_a_layout_here_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `simulate --layout` reads `compare --layout` reads."""
    flags = "--micro-batch-size 2 --recompute-granularity full"
    assert call(monkeypatch, "compare", EXAMPLE, "--sync", "all_reduce", "--json", "--layout", flags) == 0
    printed = capsys.readouterr()
    layout = json.loads(printed.out)["ways"][0]["layout"]
    assert (layout["recompute"], layout["micro_batch_size"]) == ("full", 2) and "read as Megatron-LM's" in printed.err
