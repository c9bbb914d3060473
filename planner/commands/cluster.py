"""Describe a cluster: from `nvidia-smi topo -m`, and with constants fitted to tables of nccl-tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.commands import app
from planner.commands.options import AsJson
from planner.commands.terminal import print_json
from simulator.errors import UserError

if TYPE_CHECKING:
    from simulator.cluster import CollectiveSample
    from simulator.fabric_fit import Fitted


@app.command()
def cluster(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Output of `nvidia-smi topo -m` in a file, a cluster file or a preset."),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="CLUSTER.toml", help="What a job then names as its cluster.")
    ] = Path("cluster.toml"),
    gpu: Annotated[str, typer.Option(help="Which GPU the matrix is of, like h100.")] = "",
    network: Annotated[
        str,
        typer.Option(
            metavar='"8 x 400 Gb/s"', help="Cards of a node and their speed; InfiniBand, RoCE, EFA, Ethernet."
        ),
    ] = "",
    nccl_tests: Annotated[
        list[Path] | None,
        typer.Option(
            "--nccl-tests", metavar="TABLE.txt", help="Output of all_reduce_perf and its siblings; repeatable."
        ),
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=2, help="Ranks of the tables, where they do not say.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a cluster file: what `nvidia-smi topo -m` shows, or a known cluster calibrated by nccl-tests."""
    from simulator.cluster_file import cluster_toml
    from simulator.files import check_writable, plain, write_text
    from simulator.presets import cluster_from_table

    check_writable(output)
    table, notes = _described(source, gpu, network, output.stem)
    fitted: list[Fitted] = []
    if nccl_tests:
        spec = cluster_from_table(table, f"cluster '{source}'")
        table, fitted = _calibrated(table, spec, nccl_tests, ranks, output.stem)
    comment = (
        "Written by `layoutwise cluster`, to be read and corrected. Keys are those of simulator.cluster.ClusterSpec; "
        "a collective takes latency + x / (efficiency · bandwidth) + ramp · √x seconds, x the bytes on the bus; the "
        "entry with the most ranks that a group reaches holds."
    )
    cluster_from_table(table, f"cluster '{output}'")
    write_text(output, cluster_toml(table, comment))
    if as_json:
        print_json({"cluster": str(output), "notes": notes, "fitted": plain(fitted)})
        return
    for note in notes:
        typer.echo(f"- {note}")
    if fitted:
        _print_fits(fitted)
    typer.echo(f'written to {output}: name it in a job, cluster = "{output}"')


def _described(source: str, gpu: str, network: str, name: str) -> tuple[dict[str, Any], list[str]]:
    """(the table of a cluster file, what was assumed)."""
    from simulator.files import read_text
    from simulator.presets import cluster_table, names
    from simulator.topo_cluster import cluster_from_topo
    from simulator.topo_matrix import parse_topo

    if source in names("clusters") or source.endswith(".toml"):
        if gpu or network:
            raise UserError(f"--gpu and --network describe a topology matrix; '{source}' is a cluster already")
        return cluster_table(source), []
    matrix = parse_topo(read_text(source, "topology matrix"))
    if not gpu:
        raise UserError("the matrix does not say which GPUs these are: --gpu h100, or another name")
    found = cluster_from_topo(matrix, gpu, network, name)
    return found.table, found.notes


def _calibrated(
    table: dict[str, Any], spec: Any, files: list[Path], ranks: int | None, name: str
) -> tuple[dict[str, Any], list[Fitted]]:
    """The table with fitted constants and the samples that they come from."""
    from simulator.fabric_fit import fit_cluster
    from simulator.files import read_text
    from simulator.nccl_tests import parse_nccl_tests

    samples: list[CollectiveSample] = []
    for file in files:
        samples += _samples(parse_nccl_tests(read_text(file, "nccl-tests table"), file.name, ranks), file.name, spec)
    new, fitted = fit_cluster(spec, samples)
    return _merged(table, new, fitted, name), fitted


def _samples(found: Any, source: str, spec: Any) -> list[CollectiveSample]:
    from simulator.cluster import CollectiveSample

    per_domain = max(1, spec.domain // spec.gpus_per_node)
    domains = -(-found.hosts // per_domain) if found.hosts else -(-found.ranks // spec.domain)
    return [CollectiveSample(found.collective, found.ranks, domains, size, seconds, source)
            for size, seconds in found.seconds]  # fmt: skip


def _merged(table: dict[str, Any], spec: Any, fitted: list[Fitted], name: str) -> dict[str, Any]:
    """The file's table with the constants that changed, and the samples behind it."""
    result = dict(table) | {"name": name}
    for one in fitted:
        if one.kept:
            continue
        link = spec.scale_up if one.tier == "scale_up" else spec.scale_out
        tier = dict(result[one.tier])
        fits = [_entry(fit) for fit in link.collectives[one.collective]]
        tier["collectives"] = dict(tier["collectives"]) | {one.collective: fits}
        if "latency_per_doubling" in one.determined:
            tier["latency_per_doubling"] = _microseconds(link.latency_per_doubling)
        result[one.tier] = tier
    words = [
        f"{one.tier}'s {', '.join(one.determined)} of {one.collective} from {one.samples} sizes on {one.ranks} ranks"
        for one in fitted
        if not one.kept
    ]
    if words:
        result["source"] = f"{result['source'].strip()} Fitted to the samples below: {'; '.join(words)}."
    result["samples"] = [
        {"collective": s.collective, "ranks": s.ranks, "domains": s.domains, "bytes": s.bytes, "seconds": s.seconds,
         "source": s.source}
        for s in spec.samples
    ]  # fmt: skip
    return result


def _entry(fit: Any) -> dict[str, Any]:
    found = {"ranks": fit.ranks, "latency": _microseconds(fit.latency), "efficiency": float(f"{fit.efficiency:.4g}")}
    return found | ({"ramp": float(f"{fit.ramp:.3g}")} if fit.ramp else {})


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.4g} us"


def _print_fits(fitted: list[Fitted]) -> None:
    from planner import show

    units = {"latency": 1e6, "latency_per_doubling": 1e6}
    rows = []
    for one in fitted:
        changes = [
            f"{name} {one.before[name] * units.get(name, 1):.3g} to {one.after[name] * units.get(name, 1):.3g}"
            + (" us" if name in units else "")
            for name in one.determined
        ]
        result = "as it was: it predicts sizes not used better" if one.kept else ", ".join(changes)
        rows.append([
            one.collective, f"{one.tier}, {one.ranks} ranks", str(one.samples), result,
            *(f"{median:.1%}, {worst:.0%}" for median, worst in (one.error_before, one.error_after)),
        ])  # fmt: skip
    columns = ("collective", "links", "sizes", "constants", "error before: median, worst", "after, on sizes not used")
    show.print_texts("fitted", columns, rows, texts=4)
