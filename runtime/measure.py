"""`layoutwise measure`: microbenchmarks of this machine, and the Profile that they determine."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from runtime.machine import CPU_RANK_ENVIRONMENT, end_with_starter
from simulator.errors import UserError
from simulator.files import check_writable, read_json, write_json
from simulator.job import build_job
from simulator.layout import Layout
from simulator.profile import Profile, Sample, calibrate
from simulator.simulate import simulate

Progress = Callable[[str, float], None]
GridName = Literal["full", "quick"]

# Above this spread of repeated products (p90 - p10, relative to the median) something else was using the machine.
NOISY = 0.3
# Above this share of the processors the other work counts as a disturbance, also where it was so steady that repeated
# timings agree.
BUSY = 0.1
# Seconds that one number of ranks may take: some 30 times what a quiet machine needs, start included.
TIME_LIMIT = 600.0
# The word that begins a line of progress from `runtime.microbenchmarks`; that module loads torch, this one does not.
PROGRESS = "layoutwise-progress"
# A model whose tensors are nothing beside the process.
_SMALLEST = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip


def measure(output: Path, progress: Progress | None = None, grid: GridName = "full") -> Profile:
    """Measure this machine and write its profile.

    Args:
        output: the file to write, whole or not at all.
        progress: called with a step's name and the fraction of the whole that is done.
        grid: "full" or "quick"; quick takes a third of the time, and its constants are rough.

    Raises:
        UserError: the microbenchmarks failed or took too long; the message carries their last lines.
    """
    check_writable(output)
    report: Progress = progress or (lambda name, fraction: None)

    def part(start: float, share: float) -> Progress:
        return lambda name, fraction: report(name, start + fraction * share)

    busy, own = busy_seconds()
    begin = time.perf_counter()
    # Kernels of one rank take about half of the time: a part of them before all others and a part behind, because a
    # machine that others use too is now faster, now slower for a minute.
    machine, first = _measure_ranks(1, grid, part(0.0, 0.25))
    worlds, samples = world_sizes(machine["kind"], machine["devices"], grid), list[Sample]()
    for index, ranks in enumerate(worlds):
        at_once = [1, *worlds] if machine["kind"] == "cpu" and ranks == worlds[-1] else []
        share = part(0.25 + index / len(worlds) / 2, 0.5 / len(worlds))
        samples += _measure_ranks(ranks, grid, share, at_once)[1]
    second = _measure_ranks(1, grid, part(0.75, 0.25))[1]
    profile = profile_of(machine, [*itertools.starmap(pooled, zip(first, second, strict=True)), *samples])
    if profile.kind == "cpu":
        profile = replace(profile, process_memory=process_memory(profile))
    write_json(output, profile)
    report("done", 1.0)
    busy_after, own_after = busy_seconds()
    others = (busy_after - busy - (own_after - own)) / (time.perf_counter() - begin)
    for disturbance in disturbances(noise(profile.samples), others, machine["devices"]):
        print(f"warning: {disturbance}; measure again on a quiet machine", file=sys.stderr)
    return profile


def world_sizes(kind: str, devices: int, grid: GridName = "full") -> list[int]:
    """Numbers of ranks beyond one that are measured: powers of two and all devices, on a CPU up to two on each.

    >>> world_sizes("cpu", 2), world_sizes("gpu", 8), world_sizes("cpu", 6), world_sizes("gpu", 1)
    ([2, 4], [2, 4, 8], [2, 4, 6, 8, 12], [])
    """
    most = 2 * devices if kind == "cpu" else devices
    if grid == "quick":
        most = min(2, most)
    sizes = {2**i for i in range(1, most.bit_length())} | {devices, most}
    return sorted(size for size in sizes if 1 < size <= most)


def pooled(one: Sample, other: Sample) -> Sample:
    """Timings of the same thing at two times: the means of medians and percentiles.

    >>> pooled(Sample("memory", (8.0,), 2.0, 1.5, 2.5), Sample("memory", (8.0,), 4.0, 3.0, 5.0))
    Sample(kind='memory', sizes=(8.0,), seconds=3.0, p10=2.25, p90=3.75, precision='')
    """
    return replace(one, **{name: (getattr(one, name) + getattr(other, name)) / 2 for name in ("seconds", "p10", "p90")})


def profile_of(machine: dict[str, Any], samples: Sequence[Sample]) -> Profile:
    """The profile of a machine that described itself, with the constants fitted to the samples."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    versions = {"python": sys.version.split()[0], **machine["versions"]}
    constants: dict[str, Any] = calibrate(samples, machine["kind"], machine["devices"])
    return Profile(created=now, samples=tuple(samples), **(machine | {"versions": versions}), **constants)


def process_memory(profile: Profile) -> float:
    """Bytes of a rank on a processor besides its tensors: the interpreter, the libraries, and what a run loads and
    makes once. A model of a few thousand weights is trained, and what is predicted of its tensors taken off."""
    from planner.plan import Certificate, Plan, write_plan
    from runtime.here import run_here
    from runtime.settings import Settings

    with tempfile.TemporaryDirectory(prefix="layoutwise-") as folder:
        model, known, file = (Path(folder) / name for name in ("config.json", "profile.json", "plan.json"))
        write_json(model, _SMALLEST)
        write_json(known, profile)
        job = build_job(
            {
                "model": str(model), "cluster": "this-machine", "nodes": 1, "profile": str(known),
                "training": {"global_batch_size": 2, "seq_len": 16},
            },
            "the smallest job",
        )  # fmt: skip
        found = simulate(job, Layout())
        write_plan(Plan(job, found, (), found, Certificate(1, 0, 0, 0, 1, 0.0, 0.0), {}), file)
        # The last of three steps of warm-up fills the heap; the two before it are those that count memory.
        measured = run_here(file, Path(folder) / "measurement.json", Settings(4, 3))
    memory = found.memory
    return max(measured.peak_memory) - (memory.peak - memory.overhead)


def noise(samples: Sequence[Sample]) -> float:
    """How far repeated products lie apart: the median over their sizes of (p90 - p10) / median."""
    return float(np.median([(s.p90 - s.p10) / s.seconds for s in samples if s.kind == "matmul"]))


def disturbances(noise: float, others: float, devices: int) -> list[str]:
    """What speaks against the samples: a spread of repeated products, or processors that others used meanwhile."""
    found = []
    if noise > NOISY:
        found.append(f"repeated matrix products lie {noise:.0%} apart (more than {NOISY:.0%})")
    if others > BUSY * devices:
        found.append(f"other work used {others:.1f} of the {devices} processors")
    return found


def busy_seconds() -> tuple[float, float]:
    """Seconds of work so far on the processors that this process may use: by everyone, and by it and its children.

    Without /proc/stat (macOS) nothing is known of others: both are its own.
    """
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return own, own
    names = {f"cpu{index}" for index in os.sched_getaffinity(0)}
    ticks = 0
    for name, *counts in (line.split() for line in lines if line.startswith("cpu")):
        if name in names:
            # user, nice, system, then idle and waiting, then interrupts and what other guests took.
            ticks += sum(int(counts[i]) for i in (0, 1, 2, 5, 6, 7))
    return ticks / os.sysconf("SC_CLK_TCK"), own


def _measure_ranks(
    ranks: int, grid: GridName, report: Progress, at_once: Sequence[int] = ()
) -> tuple[dict[str, Any], list[Sample]]:
    """Run the microbenchmarks on some ranks of this machine: how it describes itself, and its samples, with those of
    fewer ranks computing `at_once`."""
    with tempfile.TemporaryDirectory(prefix="layoutwise-") as folder:
        result = Path(folder) / "samples.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "runtime.microbenchmarks", f"--grid={grid}", f"--output={result}"]
        command += ["--at-once", *map(str, at_once)] if at_once else []
        report(f"starting {ranks} rank{'s' if ranks > 1 else ''}", 0.0)
        _run(command, Path(folder) / "errors.txt", report)
        data = read_json(result, "result of the microbenchmarks")
    samples = [Sample(**{**s, "sizes": tuple(s["sizes"])}) for s in data["samples"]]
    return data["machine"], samples


def _run(command: list[str], errors: Path, report: Progress) -> None:
    """Run a command in a rank's environment, passing its lines of progress on.

    Raises UserError when it fails or exceeds TIME_LIMIT.
    """
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = os.environ | CPU_RANK_ENVIRONMENT | {"PYTHONPATH": path}
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            preexec_fn=lambda: end_with_starter(signal.SIGTERM),
        ) as process,
    ):
        # torchrun ends its ranks when it is asked to, not when it is killed.
        timer = threading.Timer(TIME_LIMIT, process.send_signal, (signal.SIGTERM,))
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                word, _, rest = line.strip().partition(" ")
                if word == PROGRESS:
                    fraction, _, name = rest.partition(" ")
                    report(name, float(fraction))
            code = process.wait()
        finally:
            timed_out = not timer.is_alive()
            timer.cancel()
            if process.poll() is None:
                process.terminate()
    if timed_out:
        raise UserError(f"the microbenchmarks did not finish within {TIME_LIMIT:.0f} s; is the machine busy?")
    if code != 0:
        raise UserError(f"the microbenchmarks failed (exit code {code}): {_last_lines(errors.read_text())}")


def _last_lines(text: str, count: int = 12) -> str:
    """The end of an error output, where the first rank's exception stands before torchrun's own summary."""
    lines = [line for line in text.splitlines() if line.strip()]
    failed = next((i for i, line in enumerate(lines) if "Traceback" in line), 0)
    exceptions = [line for line in lines[failed:] if "Error" in line]
    return exceptions[0].strip() if exceptions else "\n".join(lines[-count:])


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m runtime.measure -o profile.json`."""
    parser = argparse.ArgumentParser(prog="python -m runtime.measure", description="Measure this machine.")
    parser.add_argument("-o", "--output", type=Path, default=Path("profile.json"))
    parser.add_argument("--quick", action="store_true", help="few sizes and repetitions: rough constants")
    options = parser.parse_args(arguments)

    def show(name: str, fraction: float) -> None:
        print(f"{fraction:4.0%}  {name}", file=sys.stderr)

    try:
        profile = measure(options.output, show, "quick" if options.quick else "full")
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    print(json.dumps({"profile": str(options.output), "name": profile.name, "noise": noise(profile.samples)}))


if __name__ == "__main__":
    main()
