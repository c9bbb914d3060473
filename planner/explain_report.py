"""What `layoutwise explain` finds besides the two tables of an explanation, printed and as one JSON document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from planner import documents, show
from planner.bottleneck import OutOfReach, constraint_lines, constraints, constraints_json, out_of_reach
from planner.certainty import choice_lines
from planner.explain import Explanation, remarks, sentences, why_lines
from planner.plan import Plan
from planner.remedies import advice
from planner.step_report import kernel_rows, parts_json, parts_of, transfer_rows
from planner.what_if import COLUMNS, PATIENCE, USUAL, Outcome, asked, seconds_of, what_if, what_if_json, what_if_rows
from simulator.files import plain

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Further:
    """What had to be planned anew: the fastest layout out of reach (None where there is none, or nobody looked:
    `searched`), and the outcomes of variants; a `hint` says what was left out."""

    beyond: OutOfReach | None
    searched: bool
    outcomes: tuple[Outcome, ...]
    hint: str = ""


def look_further(read: Plan, given: Sequence[str] | None, report: Progress) -> Further:
    """Plan what a user asked for with --what-if, or what is quick."""
    wanted = asked(read, given)
    if not wanted and (given is not None or read.certificate.seconds > PATIENCE):
        hint = "" if given is not None else _hint(read)
        return Further(None, False, (), hint)
    # Memory without a limit is searched with the variants, as one more of them.
    report("memory without a limit", 0.0)
    beyond = out_of_reach(read)
    share = 1 / (1 + len(wanted))
    outcomes = what_if(read, wanted, lambda what, done: report(what, share + (1 - share) * done)) if wanted else []
    return Further(beyond, True, tuple(outcomes), "" if wanted else _hint(read))


def reasons(read: Plan, found: Explanation) -> list[str]:
    """What binds, and why others lose, in sentences. Memory's part is searched where that is quick."""
    beyond = out_of_reach(read) if read.certificate.seconds <= PATIENCE else None
    best = found.columns[0][1]
    return constraint_lines(constraints(read, parts_of(read.job, best), beyond), best) + sentences(found)


def _hint(read: Plan) -> str:
    return (
        f"--what-if plans {', '.join(USUAL)} too, in about {seconds_of(read):.0f} s; or name one of them, like "
        f"--what-if {USUAL[0]}"
    )


def print_explanation(read: Plan, found: Explanation, further: Further) -> None:
    """Tables of time and memory, the step in parts, what binds, why others lose, and what would change it."""
    job, best = read.job, found.columns[0][1]
    show.print_columns(found.columns, job)
    parts = parts_of(job, best)
    rows = kernel_rows(parts, best, job)
    where = f"pipeline rank {parts.rank}, " if best.layout.pp > 1 else ""
    show.print_texts(
        f"kernels of the step ({where}forward and backward)",
        ("kernel", "seconds", "of the step", "rate (of the data sheet's peak)"), rows,
    )  # fmt: skip
    if moved := transfer_rows(parts, best):
        show.print_texts(
            "communication of the step, alone on its links",
            ("axis", "collective", "times x size", "over", "each", "bus bandwidth", "all"), moved, 4,
        )  # fmt: skip
    lines = constraint_lines(constraints(read, parts, further.beyond), best)
    if further.searched and further.beyond is None:
        lines.append("memory costs nothing: no layout would be faster on devices that hold everything")
    lines += choice_lines(read) + remarks(found) + why_lines(found)
    show.print_lines(lines)
    advices = {name: advice(job, p) for name, p in found.columns if p.timeline.memory}
    for name, one in advices.items():
        show.print_memory(name, dict(found.columns)[name], job)
        show.print_advice(dict(found.columns)[name], job, one, name)
    if further.outcomes:
        show.print_texts(
            "what if (tokens/s over those of the recommended layout; planned anew)",
            COLUMNS, what_if_rows(further.outcomes), 2,
        )  # fmt: skip
    if further.hint:
        show.print_lines([further.hint])


def explanation_json(read: Plan, found: Explanation, further: Further) -> dict[str, Any]:
    """What `layoutwise explain --json` prints."""
    job, best = read.job, found.columns[0][1]
    columns: dict[str, Any] = {
        name: documents.prediction_json(p) | documents.warnings_json(job, p) for name, p in found.columns
    }
    for name, p in found.columns:
        if p.timeline.memory:
            columns[name] |= documents.memory_json(p, job) | documents.remedies_json(advice(job, p))
    for name, terms in found.differences.items():
        columns[name]["difference"] = {
            "step_seconds": dict(found.columns)[name].step_seconds - best.step_seconds,
            "terms": [vars(term) for term in terms],
        }
    parts = parts_of(job, best)
    columns["recommended"]["parts"] = parts_json(parts)
    if found.against is not None:
        columns["against"] = {"layout": plain(found.against), "problems": list(found.problems)}
    return (
        columns
        | constraints_json(constraints(read, parts, further.beyond), further.beyond)
        | {"what_if": what_if_json(further.outcomes), "reasons": [*choice_lines(read), *sentences(found)]}
    )
