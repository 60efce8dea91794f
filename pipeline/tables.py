"""What the `hessian` command prints: tables of plans, of preflight, and of what a run did."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.errors import mebibytes
from pipeline.execution.simulator import forecast, measured_in
from pipeline.planning.job_plan import JobPlan
from pipeline.planning.machine_profiles import Profile, at_hand
from pipeline.planning.memory import (
    PROCESS_BYTES,
)
from pipeline.runs.attempt import Outcome
from pipeline.storage.output import Output


def open_console(*, stderr: bool = False) -> Console:
    """Give the terminal, or what stands in its place."""
    return Console(stderr=stderr)


def named_values(rows: Iterable[tuple[str, Any]]) -> Table:
    """Lay out names and values."""
    table = Table(show_header=False)
    for name, value in rows:
        table.add_row(str(name), f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
    return table


def show_preflight(made: JobPlan) -> None:
    """Print what preflight found."""
    verdict = made.manifest.preflight
    table = Table("parameter", "engine", "gradient", "double backward", "engines tried", title="preflight")
    for name, found in verdict.parameters.items():
        tried = "\n".join(f"{engine} {did}" for engine, did in found.tried.items())
        table.add_row(name, found.engine, f"{found.gradient:.0e}", f"{found.differences:.0e}", tried)
    console = open_console()
    console.print(table)
    console.print(
        named_values(
            [
                ("gradient", "its error against differences of the loss"),
                ("double backward", "its error against differences of the gradient"),
                ("block (a, b) against (b, a)", f"{verdict.asymmetry:.0e}"),
                ("samples", verdict.samples),
                ("set for the run", ", ".join(verdict.contexts)),
                ("seconds", f"{verdict.seconds:.1f}"),
            ]
        )
    )


def show_plan(made: JobPlan) -> None:
    """Print a plan."""
    manifest, tiling, memory = made.manifest, made.tiling, made.memory
    parameters = Table("parameter", "shape", "rows", "engine", "ms per row")
    for p in manifest.layout:
        cost = made.costs.get(p.name)
        seconds = "" if cost is None else f"{1e3 * cost.seconds_per_row * manifest.fingerprint.samples:.2f}"
        shape = " x ".join(map(str, p.shape)) or "scalar"
        parameters.add_row(p.name, shape, f"{p.offset:,} to {p.span.stop:,}", manifest.engines[p.name], seconds)
    rows, cols = max(map(tiling.shape, tiling.tiles()))
    console = open_console()
    console.print(parameters)
    console.print(
        named_values(
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
                    f"{mebibytes(made.stored_bytes)} before compression "
                    f"({manifest.symmetry}, {manifest.store_dtype}, {' and '.join(manifest.formats)})",
                ),
                (
                    "memory per worker",
                    f"{mebibytes(memory.total_bytes)} projected (process {mebibytes(PROCESS_BYTES)}, "
                    f"tiles {mebibytes(memory.buffer_bytes)}, engine {mebibytes(memory.engine_bytes)}), "
                    f"{mebibytes(made.allowed_bytes)} allowed",
                ),
                *(
                    [
                        (
                            "memory of its GPU",
                            f"{mebibytes(memory.device_bytes)} projected, "
                            f"{mebibytes(made.allowed_device_bytes)} allowed",
                        )
                    ]
                    if made.allowed_device_bytes is not None
                    else []
                ),
                ("measured on", made.place),
                ("time", f"{made.makespan_seconds():.1f} s predicted for the tiles on {made.workers} workers"),
            ]
        )
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
        table.add_row(f"{workers:,}", *row, f"{found.tail_seconds:,.1f}")
    console = open_console()
    console.print(table)
    console.print(profile.describe(), highlight=False, soft_wrap=True)


def show_outcome(outcome: Outcome) -> None:
    """Print what a run did."""
    hessian = outcome.hessian
    proof = "before, or switched off" if outcome.verification is None else outcome.verification.summary()
    rows: list[tuple[str, Any]] = [
        ("Hessian", f"{hessian.shape[0]:,} x {hessian.shape[1]:,}, {hessian.dtype}, {hessian.manifest.symmetry}"),
        ("of", f"{len(hessian.parameters)} parameters over {hessian.manifest.fingerprint.samples:,} samples"),
        ("loss", f"{hessian.loss:.9g}"),
        ("tiles", f"{outcome.computed} computed now, {outcome.tiles} in all"),
        (
            "seconds",
            f"{outcome.plan_seconds:.1f} planning, {outcome.tile_seconds:.1f} tiles, "
            f"{outcome.verify_seconds:.1f} verifying",
        ),
        ("verified", proof),
        ("at", hessian.url),
    ]
    if outcome.lost:
        rows.insert(4, ("repeated", ", ".join(f"{count} tiles ({loss})" for loss, count in outcome.lost.items())))
    open_console().print(named_values(rows))
