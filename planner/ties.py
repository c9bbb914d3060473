"""Of layouts whose difference nobody can tell, the simplest.

The search ends with the best layouts of the whole space, proved. Ties are resolved among fewer: those it returns,
plain data parallelism, and what becomes of the recommended one when a single complication is taken away, again and
again while the result still ties with the best. So a simpler layout that differs in more than that may tie as well and
not be found; a better one may not, for that is what the search has proved.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from planner.plan import Choice, shortest_first
from simulator.critical_path import critical_path
from simulator.error_bars import tie_share
from simulator.job import Job
from simulator.layout import Layout
from simulator.memory import capacity, memory_per_rank
from simulator.program import stage_costs
from simulator.results import Prediction
from simulator.risk import HIGH_RISK, needed, out_of_memory_probability
from simulator.simplicity import complications, recommended
from simulator.simulate import simulate
from simulator.sync_cost import is_simulated

# Rounds of taking complications away: a layout has about as many at most.
MOST_ROUNDS = 8


def resolve(
    job: Job, best: Sequence[Prediction], baseline: Prediction, fastest: Prediction
) -> tuple[list[Prediction], Choice]:
    """The recommended prediction and those behind it, best first, and how it was chosen.

    Args:
        best: the best of the search, best first.
        baseline: plain data parallelism.
        fastest: the shortest mean step of all that were simulated and may be recommended.
    """
    share, top = tie_share(), best[0]
    safe = top.out_of_memory_probability <= HIGH_RISK
    limit = top.step_seconds * (1 + share)
    pool = {p.layout: p for p in best if _risk_is_fine(p, safe)}
    if baseline.fits and _risk_is_fine(baseline, safe) and _allowed(job, baseline.layout):
        pool.setdefault(baseline.layout, baseline)
    tried: set[Layout] = set(pool)
    chosen = _simplest(pool, share)
    for _ in range(MOST_ROUNDS):
        for layout in simpler(chosen.layout):
            if layout not in tried:
                tried.add(layout)
                if found := _within(job, layout, limit, safe):
                    pool[layout] = found
        before, chosen = chosen, _simplest(pool, share)
        if chosen is before:
            break
    others = sorted((p for p in pool.values() if p is not chosen), key=shortest_first)
    ties = tuple(p.layout for p in others if p.step_seconds <= limit)
    choice = Choice(share, top.layout, top.step_seconds, fastest.layout, fastest.step_seconds, ties, "")
    # Shown are those that are likely to run out of memory too.
    behind = sorted(({p.layout: p for p in best} | pool).values(), key=shortest_first)
    kept = [p for p in behind if p is not chosen][: max(0, len(best) - 1)]
    return [chosen, *kept], dataclasses.replace(choice, why=_why(choice, chosen, baseline))


def simpler(layout: Layout) -> list[Layout]:
    """The layout with one complication taken away, for each that it has; legal or not."""
    found = []
    flat: dict[str, Any] = {"schedule": "1F1B", "virtual_stages": 1, "stage_layers": None}
    changes: dict[str, Callable[[], Layout]] = {
        "virtual stages": lambda: dataclasses.replace(layout, **flat),
        "schedule": lambda: dataclasses.replace(layout, **flat),
        "stage split": lambda: dataclasses.replace(layout, stage_layers=None),
        "recompute": lambda: dataclasses.replace(layout, recompute="none"),
        "offload": lambda: dataclasses.replace(layout, offload="none"),
        "replicas of shards": lambda: dataclasses.replace(
            layout, dp_replicate=1, dp_shard=layout.dp_replicate * layout.dp_shard
        ),
        "ZeRO 3": lambda: dataclasses.replace(layout, zero_stage=1),
        "rank order": lambda: dataclasses.replace(layout, rank_order=Layout.rank_order),
        "tp": lambda: _to_data(layout, "tp", sequence_parallel=False),
        "cp": lambda: _to_data(layout, "cp"),
        "pp": lambda: _to_data(layout, "pp", **flat),
        # Experts are spread over ranks that are there for other axes.
        "ep": lambda: dataclasses.replace(layout, ep=1),
    }
    for name in complications(layout):
        if name in changes:
            found.append(changes[name]())
    return [one for one in dict.fromkeys(found) if one != layout]


def _to_data(layout: Layout, axis: str, **more: Any) -> Layout:
    """The ranks of an axis given to data parallelism: to shards where something is sharded, else to replicas."""
    data = "dp_shard" if layout.zero_stage else "dp_replicate"
    ranks = getattr(layout, data) * getattr(layout, axis)
    return dataclasses.replace(layout, **{axis: 1, data: ranks, **more})


def _simplest(pool: dict[Layout, Prediction], share: float) -> Prediction:
    predictions = list(pool.values())
    values = [p.step_seconds for p in predictions]
    return predictions[recommended(values, [p.layout for p in predictions], share)]


def _within(job: Job, layout: Layout, limit: float, safe: bool) -> Prediction | None:
    """The prediction of a layout that may be recommended and whose step is no longer than `limit`; simulated only where
    its bound says that it may be."""
    if not _allowed(job, layout) or layout.problems(job):
        return None
    stages = stage_costs(job, layout)
    need, room = needed(job, layout, memory_per_rank(job, layout, stages)), capacity(job, layout)
    if need > room or (safe and out_of_memory_probability(need, room, job.stack.name) > HIGH_RISK):
        return None
    alone = not job.cluster.concurrency and not is_simulated(job, layout)
    if alone and critical_path(job, layout, stages) > limit:
        return None
    found = simulate(job, layout)
    return found if found.step_seconds <= limit else None


def _risk_is_fine(prediction: Prediction, safe: bool) -> bool:
    return not safe or prediction.out_of_memory_probability <= HIGH_RISK


def _allowed(job: Job, layout: Layout) -> bool:
    """Whether [search] admits a layout."""
    for name, values in job.search.items():
        if getattr(layout, name) not in [tuple(value) if isinstance(value, list) else value for value in values]:
            return False
    return True


def _why(choice: Choice, chosen: Prediction, baseline: Prediction) -> str:
    """One sentence: why this one is recommended."""
    band = f"{choice.tie:.1%}"
    best = "the shortest step"
    count = f"{len(choice.ties)} other layout{'s tie' if len(choice.ties) > 1 else ' ties'} with it (within {band})"
    if not choice.ties:
        said = f"it has {best}, and no other layout that was tried is within {band} of it"
    elif chosen.layout == choice.best:
        said = f"it has {best}; {count}, none of them simpler"
    else:
        gone = [c for c in complications(choice.best) if c not in complications(chosen.layout)]
        without = f" without {', '.join(gone)}" if gone else ""
        said = (
            f"it is simpler{without} than {choice.best.short()}, which has {best} but ties with it: that one's step is "
            f"{_sign(choice.best_step_seconds / chosen.step_seconds - 1)}, and differences of two layouts are off by "
            f"{band} in half of the cases"
        )
    if chosen.layout == baseline.layout and choice.ties:
        said += "; no hybrid that was found beats plain data parallelism by more than that"
    return said


def _sign(share: float) -> str:
    """`1.2% shorter`."""
    if math.isclose(share, 0.0, abs_tol=5e-4):
        return "the same"
    return f"{abs(share):.1%} {'shorter' if share < 0 else 'longer'}"
