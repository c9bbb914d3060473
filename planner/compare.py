"""One layout under every way to keep its replicas together, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simulator.errors import UserError
from simulator.files import plain
from simulator.job import Job
from simulator.layout import Layout
from simulator.layout_text import complete
from simulator.results import Prediction
from simulator.simulate import simulate
from simulator.sync_bounds import centre_seconds, gather_seconds, ring_seconds, server_seconds, tree_seconds
from simulator.sync_cost import exchange, exchange_bound
from simulator.sync_rules import SYNCS, changes_mathematics

# How often local SGD averages, and how far stale-synchronous replicas may be apart, unless --layout says: DiLoCo is
# used with tens to hundreds of steps (arXiv 2311.08105, section 3.1), the bounds of Ho et al. (2013) are single digits.
INTERVAL = 50
STALENESS = 4
# Fields of --layout that go to the ways that have them.
OWN_FIELDS = ("servers", "staleness", "sync_interval", "outer_optimizer")


@dataclass(frozen=True)
class Way:
    """One row: a name, the layout, why it cannot run or its prediction, and the least seconds of an exchange."""

    name: str
    layout: Layout
    problems: tuple[str, ...]
    prediction: Prediction | None
    bound: float

    @property
    def p95(self) -> float:
        """The 95th percentile of the step; all steps are alike where nothing differs."""
        assert self.prediction is not None
        found = self.prediction.synchronisation
        return self.prediction.step_seconds if found is None else found.p95


@dataclass(frozen=True)
class Comparison:
    """The rows, and what the textbook says of an exchange of so many bytes between so many replicas: (name, formula,
    bytes per second of a replica's links, seconds)."""

    ways: tuple[Way, ...]
    replicas: int
    bytes: float
    textbook: tuple[tuple[str, str, float, float], ...]


def compare(job: Job, given: Mapping[str, Any], syncs: str = "all") -> Comparison:
    """Predict one layout under several ways to keep its replicas together.

    Args:
        given: the fields of the layout that the user names. Its servers, staleness, sync_interval and outer_optimizer
            go to the ways that have them.
        syncs: "all", or ways separated by commas.

    Raises:
        UserError: a way that is not known, a layout without replicas or one that no way can run.
    """
    chosen: tuple[str, ...] = SYNCS if syncs == "all" else tuple(syncs.split(","))
    for name in chosen:
        if name not in SYNCS:
            raise UserError(f"--sync '{name}' is not known; it is all, or some of {', '.join(SYNCS)}")
    given = {name: value for name, value in given.items() if name != "sync"}
    own: dict[str, Any] = {str(name): given.pop(name) for name in OWN_FIELDS if name in given}
    # Any way but an all-reduce leaves what is not named to the replicas.
    base = dataclasses.replace(complete(given | {"sync": "local_sgd"}, job), sync="all_reduce")
    ways = [_way(job, name, layout) for name, layout in _layouts(job, base, own, chosen)]
    if all(way.problems for way in ways):
        raise UserError(f"layout '{base.short()}' cannot run this job in any way: {'; '.join(ways[0].problems)}")
    size, cards, rate = exchange(job, base)
    n, k = base.dp_replicate, int(own.get("servers") or min(job.nodes, base.dp_replicate))
    textbook = (
        ("ring", "2(n-1)/n M/B", cards, ring_seconds(n, size, cards)),
        ("double tree", "2 M/B", cards, tree_seconds(n, size, cards)),
        ("all-gather (ZeRO-3)", "3(n-1)/n M/B", cards, gather_seconds(n, size, cards)),
        ("centre, all send to it", "2(n-1) M/B", cards, centre_seconds(n, size, cards)),
        (f"k = {k} servers, machines of their own", "max(1, n/k) M/B", rate, server_seconds(n, k, size, rate)),
    )
    return Comparison(tuple(ways), n, size, textbook)


def _layouts(job: Job, base: Layout, own: dict[str, Any], chosen: tuple[str, ...]) -> list[tuple[str, Layout]]:
    rows: list[tuple[str, dict[str, Any]]] = []
    servers = own.get("servers", min(job.nodes, base.dp_replicate))
    interval = own.get("sync_interval", INTERVAL)
    bound = own.get("staleness", STALENESS)
    for sync in chosen:
        named: dict[str, Any] = {"sync": sync}
        if sync == "parameter_server":
            named["servers"] = servers
            rows.append(("servers, synchronous", named))
            if bound:
                rows.append((f"servers, at most {bound} steps apart", named | {"staleness": bound}))
            rows.append(("servers, asynchronous", named | {"staleness": None}))
        elif sync == "local_sgd":
            named["sync_interval"] = interval
            rows.append((f"local SGD, {interval} steps", named))
            outer = named | {"outer_optimizer": own.get("outer_optimizer", "nesterov")}
            if outer["outer_optimizer"] != "none":
                rows.append((f"DiLoCo, {interval} steps", outer))
        elif sync == "reduce_broadcast":
            rows.append(("centre: reduce, broadcast", named))
        else:
            rows.append(("all-reduce", named))
            if base.zero_stage == 0 and 3 in job.stack.zero_stages and base.dp_replicate > 1:
                sharded = {"dp_replicate": 1, "dp_shard": base.dp_replicate, "zero_stage": 3}
                rows.append(("all-gather (ZeRO-3)", named | sharded))
    return [(name, dataclasses.replace(base, **changes)) for name, changes in rows]


def _way(job: Job, name: str, layout: Layout) -> Way:
    problems = tuple(layout.problems(job))
    # What a sharded layout exchanges lies along another axis.
    replicas = dataclasses.replace(layout, dp_replicate=layout.dp, dp_shard=1, zero_stage=0)
    bound = exchange_bound(job, replicas if layout.dp_replicate == 1 else layout)
    if layout.dp_replicate == 1 and layout.zero_stage == 3:
        bound *= 1.5
    return Way(name, layout, problems, None if problems else simulate(job, layout), bound)


def comparison_json(found: Comparison) -> dict[str, Any]:
    """What `layoutwise compare --json` prints."""
    return {
        "replicas": found.replicas,
        "bytes": found.bytes,
        "textbook": [
            {"name": name, "formula": formula, "bandwidth": rate, "seconds": seconds}
            for name, formula, rate, seconds in found.textbook
        ],
        "ways": [_way_json(way) for way in found.ways],
    }


def _way_json(way: Way) -> dict[str, Any]:
    named = {
        "name": way.name,
        "changes_mathematics": changes_mathematics(way.layout),
        "exchange_bound": way.bound,
        "layout": plain(way.layout),
        "problems": list(way.problems),
    }
    if way.prediction is None:
        return named
    prediction: dict[str, Any] = plain(way.prediction)
    prediction.pop("timeline")
    return named | {"p95": way.p95} | prediction
