"""What the `hessian` command prints: tables of plans, of preflight, and of what a run did."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.analysis.comparison import Comparison
from pipeline.errors import counted, human_bytes, human_seconds, printable, shown
from pipeline.execution.simulator import forecast, measured_in
from pipeline.planning.job_plan import JobPlan
from pipeline.planning.machine_profiles import Profile, at_hand
from pipeline.planning.memory import PROCESS_BYTES
from pipeline.runs.attempt import Outcome
from pipeline.storage.output import Output
from pipeline.storage.run_files import read_proof

PIPE_WIDTH = 10_000  # characters
MOST_MOVED = 12  # parameters


def open_console(*, stderr: bool = False) -> Console:
    """Return the terminal, or what stands in its place: through a pipe, a row of a table is one line, however long."""
    console = Console(stderr=stderr)
    if not stderr and not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


def show_values(rows: Iterable[tuple[str, Any]]) -> None:
    """Print names and values, those there are: a table on a terminal, plain lines elsewhere."""
    texts = {name: f"{value:,}" if type(value) is int else str(value) for name, value in rows if value is not None}
    console = open_console()
    if not console.is_terminal:
        for name, text in texts.items():
            line = shown(f"{name}: {text}", keep="\n")
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    table = Table(show_header=False)
    for row in texts.items():
        _add(table, *row)
    console.print(table)


def show_status(found: Mapping[str, Any]) -> None:
    """Print what `status` found."""
    show_values(_told(found).items())


def _told(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `status` found, for people."""
    told = {name: value for name, value in found.items() if name not in {"finished", "verified"}}  # the state says so
    if "bytes" in told:
        told["bytes"] = human_bytes(told["bytes"])
    if (left := told.pop("seconds left", None)) is not None:
        told["time left"] = human_seconds(left)
    return told


def watch_status(read: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Show how far a run is, again and again until nobody is at work on it: a live table, or lines through a pipe.

    Args:
        read: gives what `status` finds.
        seconds: between two questions.

    Returns:
        The last answer.
    """
    console, found = open_console(), read()
    if not console.is_terminal:
        while found["state"] == "running":
            console.print(Text(shown(_in_a_line(found))), soft_wrap=True)
            time.sleep(seconds)
            found = read()
        show_status(found)
        return found
    with Live(_live(found, None), console=console, refresh_per_second=2) as live:
        before = time.monotonic(), found
        while found["state"] == "running":
            time.sleep(seconds)
            found, now = read(), time.monotonic()
            new = found.get("bytes", 0) - before[1].get("bytes", 0)
            live.update(_live(found, new / (now - before[0])), refresh=True)
            before = now, found
    return found


def _in_a_line(found: Mapping[str, Any]) -> str:
    """Say how far a run is."""
    if "tiles" not in found:
        return f"{found['state']}: being planned"
    left = found.get("seconds left")
    return (
        f"{found['state']}: {found['done']:,} of {counted(found['tiles'], 'tile')}, {human_bytes(found['bytes'])}, "
        f"{counted(found.get('workers', 0), 'worker')}" + (f", {human_seconds(left)} left" if left is not None else "")
    )


def _live(found: Mapping[str, Any], bytes_per_second: float | None) -> Table:
    """Lay out how far a run is, as it is now."""
    told = _told(found)
    if bytes_per_second is not None and "bytes" in told:
        told["bytes"] += f", {human_bytes(max(bytes_per_second, 0))}/s"
    table = Table(show_header=False)
    for name, value in told.items():
        if name == "tiles":
            table.add_row(name, ProgressBar(total=max(value, 1), completed=found["done"], width=40))
        elif value is not None:
            text = f"{value:,}" if type(value) is int else value
            _add(table, name, f"{text} of {found['tiles']:,}" if name == "done" else text)
    return table


def show_outputs(found: Sequence[Mapping[str, Any]]) -> None:
    """Print outputs, a row for each."""
    table = Table("output", "state", "P", "tiles", "bytes", "time left")
    for row in found:
        tiles = f"{row['done']:,} of {row['tiles']:,}" if "tiles" in row else ""
        left = row.get("seconds left")
        _add(
            table,
            row["url"],
            row["state"],
            f"{row['P']:,}" if "P" in row else "",
            tiles,
            human_bytes(row["bytes"]) if "bytes" in row else "",
            "" if left is None else human_seconds(left),
        )
    open_console().print(table)


def show_comparison(found: Comparison) -> None:
    """Print how far Hessians are from the first, and which layers moved most."""
    console, first = open_console(), found.differences[0]
    table = Table("Hessian", "loss", "trace", "norm", "relative distance", "cosine", "shared top space")
    for d in found.differences:
        numbers = (f"{d.loss:.6g}", f"{d.trace:.6g}", f"{d.norm:.6g}", f"{d.distance / (first.norm or 1):.3g}")
        _add(table, d.url, *numbers, f"{d.cosine:.6f}", f"{d.overlap:.1%}")
    console.print(table)
    moved = Table("parameter", *(f"moved, {k}" for k in range(1, len(found.differences))), title="furthest blocks")
    for name, distances in found.moved()[:MOST_MOVED]:
        _add(moved, name, *(f"{x:.3g}" for x in distances))
    console.print(moved)


def _add(table: Table, *cells: object) -> None:
    """Add a row of texts, which are no markup."""
    table.add_row(*(Text(shown(str(cell), keep="\n")) for cell in cells))


def show_preflight(made: JobPlan) -> None:
    """Print what preflight found."""
    verdict = made.manifest.preflight
    table = Table("parameter", "engine", "gradient", "double backward", "engines tried", title="preflight")
    for name, found in verdict.parameters.items():
        tried = "\n".join(f"{engine} {did}" for engine, did in found.tried.items())
        _add(table, name, found.engine, f"{found.gradient:.0e}", f"{found.differences:.0e}", tried)
    console = open_console()
    console.print(table)
    show_values(
        [
            ("gradient", "its error against differences of the loss"),
            ("double backward", "its error against differences of the gradient"),
            ("block (a, b) against (b, a)", f"{verdict.asymmetry:.0e}"),
            ("samples", verdict.samples),
            ("set for the run", ", ".join(verdict.contexts)),
            ("seconds", f"{verdict.seconds:.1f}"),
        ]
    )


def show_plan(made: JobPlan, *, timed: bool = True) -> None:
    """Print a plan, with the time that its tiles take unless a forecast is going to say it."""
    manifest, tiling, memory = made.manifest, made.tiling, made.memory
    parameters = Table("parameter", "shape", "rows", "engine", "ms per row")
    for p in manifest.layout:
        cost = made.costs.get(p.name)
        seconds = "" if cost is None else f"{1e3 * cost.seconds_per_row * manifest.fingerprint.samples:.2f}"
        _add(parameters, p.name, p.shape_text, f"{p.offset:,} to {p.span.stop:,}", manifest.engines[p.name], seconds)
    rows, cols = max(map(tiling.shape, tiling.tiles()))
    console = open_console()
    console.print(parameters)
    show_values(
        [
            ("P", tiling.size),
            ("loss", f"{made.at.loss:.6g} over {manifest.fingerprint.samples:,} samples"),
            (
                "chunks",
                f"{tiling.side} x {tiling.side} of side {manifest.chunk}, {int(tiling.selected.sum()):,} computed",
            ),
            ("tiles", f"{len(tiling.tiles()):,}, the largest {rows:,} x {cols:,}"),
            *(
                (f"engine {name}", f"micro-batch {sizes.microbatch}, row group {sizes.row_group}")
                for name, sizes in sorted(manifest.sizes.items())
            ),
            ("FLOPs", f"{made.flops():.3g}"),
            (
                "bytes out",
                f"{human_bytes(made.stored_bytes)} before compression "
                f"({manifest.symmetry}, {manifest.store_dtype}, {' and '.join(manifest.formats)})",
            ),
            (
                "memory per worker",
                f"{human_bytes(memory.total_bytes)} projected (process {human_bytes(PROCESS_BYTES)}, "
                f"tiles {human_bytes(memory.buffer_bytes)}, engine {human_bytes(memory.engine_bytes)}), "
                f"{human_bytes(made.allowed_bytes)} allowed",
            ),
            (
                "memory of its GPU",
                None
                if made.allowed_device_bytes is None
                else f"{human_bytes(memory.device_bytes)} projected, {human_bytes(made.allowed_device_bytes)} allowed",
            ),
            ("measured on", made.place),
            ("time", made.time_text() if timed else None),
        ]
    )


def show_forecast(made: JobPlan, profile: Profile | None, measured: Output | None) -> None:
    """Print what becomes of a plan on so many workers, half and twice as many; calibrated by a run's receipts."""
    if measured:
        profile = measured_in(made, measured)
    profile = profile or at_hand(overlaps=made.overlaps)
    table = Table("workers", "seconds", "of the bound", "balance", "MB/s", "last of them idle, s")
    for workers in sorted({max(made.workers // 2, 1), made.workers, 2 * made.workers}):
        found = forecast(made, profile, workers)
        speed = f"{found.bytes_per_second / 1e6:,.0f}"
        row = (f"{found.makespan_seconds:,.1f}", f"{found.efficiency:.1%}", f"{found.balance:.1%}", speed)
        _add(table, f"{workers:,}", *row, f"{found.tail_seconds:,.1f}")
    console = open_console()
    console.print(table)
    total, slowest = profile.bottleneck(map(made.tile_cost, made.tiling.tiles()), made.manifest.dtype)
    phases = ", ".join(f"{name} {human_seconds(seconds)}" for name, seconds in total.items())
    console.print(Text(f"all tiles on one worker: {phases}; the bottleneck is {slowest}"), soft_wrap=True)
    console.print(Text(printable(profile.describe())), soft_wrap=True)


def show_spectrum(found: Mapping[str, Any]) -> None:
    """Print what `spectrum_of` found."""
    console = open_console()
    about = [("P", found["P"]), ("parameters", len(found["parameters"])), ("trace", f"{found['trace']:.6g}")]
    if "inertia" in found:
        about += [*found["inertia"].items(), ("rank", found["rank"])]
        condition = found["condition_number"]
        about.append(("condition number", "infinite" if condition is None else f"{condition:.3g}"))
    if "negative" in found:
        count, error = found["negative"]["count"], found["negative"]["error"]
        about.append(("below zero", f"{count:,.1f}, give or take {error:,.1f}"))
    show_values(about)
    if "bins" in found:
        table = Table("from", "to", "eigenvalues", "error")
        for row in reversed(found["bins"]):
            table.add_row(f"{row['from']:.0e}", f"{row['to']:.0e}", f"{row['count']:,.1f}", f"{row['error']:,.1f}")
    else:
        table = Table("eigenvalues")
        for w in reversed(found["eigenvalues"]):
            table.add_row(f"{w:.9g}")
    console.print(table)


def show_outcome(outcome: Outcome) -> None:
    """Print what a run did."""
    hessian = outcome.hessian
    before = "in an earlier run" if read_proof(hessian.output) else "no, it was switched off"
    proof = before if outcome.verification is None else outcome.verification.summary()
    samples = counted(hessian.manifest.fingerprint.samples, "sample")
    rows: list[tuple[str, Any]] = [
        ("Hessian", f"{hessian.shape[0]:,} x {hessian.shape[1]:,}, {hessian.dtype}, {hessian.manifest.symmetry}"),
        ("of", f"{counted(len(hessian.parameters), 'parameter')} over {samples}"),
        ("loss", f"{hessian.loss:.9g}"),
        ("tiles", f"{outcome.computed:,} computed now, {outcome.tiles:,} in all"),
        (
            "time",
            f"{human_seconds(outcome.plan_seconds)} planning, {human_seconds(outcome.tile_seconds)} tiles, "
            f"{human_seconds(outcome.verify_seconds)} verifying",
        ),
        ("verified", proof),
        ("at", hessian.url),
    ]
    if outcome.lost:
        rows.insert(4, ("repeated", ", ".join(f"{counted(n, 'tile')} ({loss})" for loss, n in outcome.lost.items())))
    show_values(rows)
