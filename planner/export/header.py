"""What every exported file says first: who wrote it, for which version, for which job, and what was predicted."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from textwrap import wrap

from planner.plan import Plan

WIDTH = 112


def header(plan: Plan, written_for: str, stacks: tuple[str, ...] = (), notes: tuple[str, ...] = ()) -> str:
    """The comment at the top of a file, with `#` as Python, shell and YAML have it.

    Args:
        stacks: the stacks that describe this target; the prediction for another one is called that.
        notes: sentences of the target's own.
    """
    job, best = plan.job, plan.best
    lines = [
        f"Written by layoutwise {_version()} for {written_for}.",
        f"{job.model.name} on {job.nodes} x {job.cluster.name} ({plan.layout.world_size} ranks), "
        f"{job.training.global_batch_size} x {job.training.seq_len} tokens a step, {job.training.precision}",
        f"layout: {plan.layout.short()}",
        f"predicted for the stack {job.stack.name}: {best.step_seconds:.4g} s a step, "
        f"{best.tokens_per_second_per_gpu:,.0f} tokens/s per GPU, {best.memory.peak / 2**30:.1f} GiB at the peak",
    ]
    if job.stack.name not in stacks:
        own = f': plan with training.stack = "{stacks[0]}" for one' if stacks else ""
        lines.append(f"That prediction is for {job.stack.name}, not for {written_for.split()[0]}{own}.")
    return comment(*lines, *notes)


def comment(*sentences: str) -> str:
    """Sentences as comment lines, each wrapped on its own."""
    return "".join(f"# {line}\n" for sentence in sentences for line in wrap(sentence, WIDTH, break_on_hyphens=False))


def _version() -> str:
    try:
        return version("layoutwise")
    except PackageNotFoundError:
        return "from a checkout"
