"""What was measured, beside its prediction, as tables for a terminal: runs, ranks that ran alone, profiles."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from planner.plan import Plan
from planner.show import new_console, new_table
from simulator.profile import Profile
from simulator.program import build_program, own_seconds
from simulator.results import Alone, Measurement, Prediction
from simulator.units import show_bytes, show_seconds


def print_measurement(measured: Measurement, predicted: Prediction) -> None:
    """A run beside its prediction."""
    console = new_console()
    table = new_table(measured.layout.short(), "predicted", "measured", "error")
    step = measured.step_seconds
    table.add_row(
        "step", show_seconds(predicted.step_seconds),
        f"{show_seconds(step.median)} ({show_seconds(step.p10)} to {show_seconds(step.p90)})",
        f"{predicted.step_seconds / step.median - 1:+.1%}",
    )  # fmt: skip
    peak = max(measured.peak_memory)
    table.add_row(
        "peak memory", show_bytes(predicted.memory.peak), show_bytes(peak), f"{predicted.memory.peak / peak - 1:+.1%}"
    )
    console.print(table)
    console.print(
        f"loss {measured.losses[0]:.4f} -> {measured.losses[-1]:.4f} in {measured.steps} steps, "
        f"{measured.tokens_per_second:,.0f} tokens/s on {measured.world_size} ranks ({measured.device})"
    )


def print_alone(found: Alone, plan: Plan) -> None:
    """One rank that ran by itself, beside what is predicted for it."""
    console, layout = new_console(), found.layout
    places = " ".join(f"{axis}={place}" for axis, place in found.coordinates.items() if getattr(layout, axis) > 1)
    how = "fake tensors: nothing was computed" if found.fake else f"computed on {found.device}"
    console.print(escape(f"rank {found.rank} of {layout.world_size} ({places or 'alone'}) of {layout.short()}, {how}"))
    stage, memory = found.coordinates["pp"], found.memory
    predicted = plan.best.memory_per_stage[stage]
    table = new_table("", "predicted", "measured", "error")
    if found.step_seconds is not None:
        # The optimizer's part is that of the critical rank.
        seconds = own_seconds(build_program(plan.job, layout), stage) + plan.best.breakdown.optimizer
        same = (plan.job.cluster.gpu.kind == "cpu") == (found.device == "cpu")
        error = f"{seconds / found.step_seconds - 1:+.1%}" if same else "another device"
        table.add_row("computation of a step", show_seconds(seconds), show_seconds(found.step_seconds), error)
    # What the tracker cannot tell apart is compared together: gathered parameters are activations to it.
    rows = [
        ("parameters", predicted.parameters, memory.parameters),
        ("optimizer", predicted.optimizer, memory.optimizer),
        (
            "gradients, activations, buffers",
            predicted.gradients + predicted.activations + predicted.buffers,
            memory.gradients + memory.activations + memory.temporary,
        ),
        ("peak, without context and libraries", predicted.peak - predicted.overhead, memory.peak),
    ]
    for name, expected, measured in rows:
        error = f"{expected / measured - 1:+.1%}" if measured else ""
        table.add_row(name, show_bytes(expected), show_bytes(measured), error)
    console.print(table)
    console.print(_communication(found))


def _communication(found: Alone) -> Table:
    """The collectives of a step, predicted beside counted."""
    table = new_table("collectives of a step", "along", "count predicted", "counted", "bytes predicted", "counted")
    sides = [{(one.axis, one.name): one for one in side} for side in (found.communication, found.collectives)]
    for axis, name in sorted(sides[0].keys() | sides[1].keys()):
        pair = [side.get((axis, name)) for side in sides]
        counts = [str(one.count) if one else "none" for one in pair]
        table.add_row(name, axis, *counts, *(show_bytes(one.bytes) if one else "none" for one in pair))
    return table


def print_profile(profile: Profile) -> None:
    """The constants that predictions on this machine rest on."""
    console = new_console()
    table = new_table(f"{profile.name}, {profile.created}", "")
    for precision, fit in profile.matmul.items():
        table.add_row(f"matmul {precision}", f"{fit.rate / 1e9:,.0f} GFLOP/s, k0 {fit.k0:.0f}")
    table.add_row("memory bandwidth", f"{profile.memory_bandwidth / 1e9:.1f} GB/s")
    if profile.optimizer_efficiency:
        reached = profile.optimizer_efficiency * profile.memory_bandwidth / 1e9
        table.add_row("optimizer step", f"{reached:.1f} GB/s")
    table.add_row(
        "host per kernel",
        f"{show_seconds(profile.host.forward)} forward, DTensor +{show_seconds(profile.host.dtensor)}",
    )
    table.add_row("speed of k ranks at once", ", ".join(f"{speed:.2f}" for speed in profile.concurrency))
    if profile.streaming:
        table.add_row("speed of k ranks that update at once", ", ".join(f"{speed:.2f}" for speed in profile.streaming))
    table.add_row("link", f"{profile.link_bandwidth / 1e9:.2f} GB/s, {show_seconds(profile.link_latency)}")
    for name, fits in profile.collectives.items():
        for known in fits:
            rate = known.efficiency * profile.link_bandwidth / 1e9
            among = f" of {known.active}" if known.active > known.ranks else ""
            table.add_row(f"{name}, {known.ranks}{among} ranks", f"{rate:.2f} GB/s, {show_seconds(known.latency)}")
    console.print(table)
