"""What the `hessian` command prints: tables of plans, of preflight, and of what a run did."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.errors import counted, human_bytes, human_seconds, printable, shown
from pipeline.execution.simulator import forecast, measured_in
from pipeline.planning.job_plan import JobPlan
from pipeline.planning.machine_profiles import Profile, at_hand
from pipeline.planning.memory import (
    PROCESS_BYTES,
)
from pipeline.runs.attempt import Outcome
from pipeline.storage.output import Output
from pipeline.storage.run_files import read_proof

PIPE_WIDTH = 10_000  # characters


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
    told = {name: value for name, value in found.items() if name not in {"finished", "verified"}}  # the state says so
    if "bytes" in told:
        told["bytes"] = human_bytes(told["bytes"])
    if (left := told.pop("seconds left", None)) is not None:
        told["time left"] = human_seconds(left)
    show_values(told.items())


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
        shape = " x ".join(map(str, p.shape)) or "scalar"
        _add(parameters, p.name, shape, f"{p.offset:,} to {p.span.stop:,}", manifest.engines[p.name], seconds)
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
            ("time", _predicted(made) if timed else None),
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
    console.print(Text(printable(profile.describe())), soft_wrap=True)


def show_spectrum(found: Mapping[str, Any]) -> None:
    """Print what `spectrum_of` found."""
    console = open_console()
    about = [("P", found["P"]), ("parameters", len(found["parameters"])), ("trace", f"{found['trace']:.6g}")]
    if "inertia" in found:
        about += [*found["inertia"].items(), ("rank", found["rank"])]
        condition = found["condition_number"]
        about.append(("condition number", "infinite" if condition is None else f"{condition:.3g}"))
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


def _predicted(made: JobPlan) -> str:
    return f"{human_seconds(made.makespan_seconds())} predicted for the tiles on {counted(made.workers, 'worker')}"
