"""Commands on outputs: how far they are, whether they are right, what is in them."""

import json
import sys
import time
from pathlib import Path
from typing import Literal

import click

from pipeline.cli.group import cli, endpoint_option, set_option
from pipeline.errors import BAD_INPUT, FAILED, RESUMABLE, OutputError, counted, shown


@cli.command("verify")
@click.argument("url")
@click.option("--job", type=click.Path(path_type=Path), help="The job spec; without it only chunks are checked.")
@click.option("--chunks", is_flag=True, help="Only read back what is there, of an unfinished run as well.")
@set_option
@endpoint_option
def verify_command(
    url: str, job: Path | None, overrides: tuple[str, ...], endpoint_url: str | None, *, chunks: bool
) -> None:
    """Check the finished Hessian at URL."""
    if chunks and job is not None:
        raise click.UsageError("--chunks reads back alone: leave out --job, or --chunks")
    if overrides and job is None:
        raise click.UsageError("--set replaces keys of a job spec: give --job")
    if chunks:
        _verify_chunks(url, endpoint_url)
        return
    from pipeline.errors import VerificationError
    from pipeline.spec import load_job

    asked = None if job is None else (load_job(job, overrides), job.parent)
    from pipeline.analysis.hessian import open_hessian
    from pipeline.results.receipt_audit import REMEDY
    from pipeline.results.verify import verify_hessian
    from pipeline.runs.api import load_problem

    hessian = open_hessian(url, endpoint_url)
    problem = None if asked is None else load_problem(*asked)
    found = verify_hessian(hessian, problem, retrained=True)
    if not found.ok:
        remedy = f"; {REMEDY}" if found.faults else ""
        raise VerificationError(f"output {url}: {found.summary()}{remedy}")
    click.echo(shown(found.summary()))


@cli.command("export")
@click.argument("url")
@click.argument("dest", required=False)
@click.option("--format", "kind", type=click.Choice(["parquet", "npy"]), required=True, help="What to write.")
@endpoint_option
def export_command(url: str, dest: str | None, kind: Literal["parquet", "npy"], endpoint_url: str | None) -> None:
    """Write the finished Hessian at URL in another format, to DEST.

    Parquet goes into the output itself where no DEST is given; a .npy file needs a local one.
    """
    from pipeline.console.tables import open_console
    from pipeline.progress.bar import ConsoleReporter
    from pipeline.results.export import export_hessian

    reporter = ConsoleReporter(open_console(stderr=True))
    click.echo(export_hessian(url, kind, dest, endpoint_url=endpoint_url, report=reporter))


@cli.command("report")
@click.argument("url")
@click.option("--without", metavar="PARTS", default="", help="Leave out parts, as spectrum,entries.")
@endpoint_option
def report_command(url: str, without: str, endpoint_url: str | None) -> None:
    """Make a page on the finished Hessian at URL, or on the sweep there, into its output, with its pictures.

    Of a Hessian its parts are proof, blocks, entries, spectrum, ends (of the spectrum), layers, diagonal, time and
    memory; of a sweep loss, curvature, eigenvalues and blocks.
    """
    from pipeline.console.tables import open_console
    from pipeline.progress.bar import ConsoleReporter
    from pipeline.runs.reports import report_on

    left_out = [name.strip() for name in without.split(",") if name.strip()]
    reporter = ConsoleReporter(open_console(stderr=True))
    click.echo(report_on(url, endpoint_url, without=left_out, report=reporter))


@cli.command("compare")
@click.argument("urls", nargs=-1, required=True, metavar="A B [C ...]")
@click.option("--page", metavar="URL", help="Make a page, too, in this folder.")
@click.option("--json", "as_json", is_flag=True, help="Print an object for scripts.")
@endpoint_option
def compare_command(urls: tuple[str, ...], page: str | None, endpoint_url: str | None, *, as_json: bool) -> None:
    """Say how far finished Hessians are from the first: by block, by spectrum, and which layers moved."""
    from pipeline.console.tables import open_console, show_comparison
    from pipeline.progress.bar import ConsoleReporter
    from pipeline.runs.reports import compared

    found, made = compared(urls, endpoint_url, page=page, report=ConsoleReporter(open_console(stderr=True)))
    if as_json:
        click.echo(json.dumps(found.to_json()))
    else:
        show_comparison(found)
        if made:
            click.echo(made)


@cli.command("spectrum")
@click.argument("url")
@click.option("--k", type=click.IntRange(1), help="Eigenvalues, the largest in absolute value.  [default: 20]")
@click.option("--density", is_flag=True, help="Estimate how many eigenvalues are in each decade; any size.")
@click.option("--whole", is_flag=True, help="All eigenvalues, with signs, rank and condition number; in memory.")
@click.option("--params", multiple=True, metavar="GLOB", help="Of these parameters alone, !GLOB excludes; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print an object for scripts.")
@endpoint_option
def spectrum_command(
    url: str,
    k: int | None,
    params: tuple[str, ...],
    endpoint_url: str | None,
    *,
    density: bool,
    whole: bool,
    as_json: bool,
) -> None:
    """Say which eigenvalues the finished Hessian at URL has."""
    if (k is not None) + density + whole > 1:
        raise click.UsageError("--k, --density and --whole exclude each other: give one of them")
    from pipeline.analysis.hessian import open_hessian
    from pipeline.analysis.spectrum_summary import spectrum_of
    from pipeline.console.tables import open_console, show_spectrum
    from pipeline.progress.bar import ConsoleReporter

    hessian = open_hessian(url, endpoint_url)
    hessian.report = ConsoleReporter(open_console(stderr=True))
    chosen = hessian.select(*params) if params else hessian
    found = spectrum_of(chosen, "density" if density else "whole" if whole else "few", k or 20)
    if as_json:
        click.echo(json.dumps(found))
    else:
        show_spectrum(found)


@cli.command("status")
@click.argument("url")
@click.option("--watch", is_flag=True, help="Go on saying it until nobody is at work there.")
@click.option(
    "--every",
    type=click.FloatRange(0.1),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="With --watch: how often.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object; with --watch one a line.")
@endpoint_option
def status_command(url: str, every: float, endpoint_url: str | None, *, watch: bool, as_json: bool) -> None:
    """Say how far the run at URL is.

    Exit status: 0 finished and proven, 1 unproven, 75 running or interrupted, 2 absent.
    """
    from pipeline.console.tables import show_status, watch_status
    from pipeline.runs.status import status

    found = status(url, endpoint_url)
    if as_json:
        click.echo(json.dumps(found))
        while watch and found["state"] == "running":
            time.sleep(every)
            found = status(url, endpoint_url)
            click.echo(json.dumps(found))
    elif found["state"] == "absent":
        raise OutputError(f"output {url}: holds no Hessian (no manifest.json)")
    elif watch:
        found = watch_status(lambda: status(url, endpoint_url), every)
    else:
        show_status(found)
    if status_code := {"finished": 0, "unproven": FAILED, "absent": BAD_INPUT}.get(found["state"], RESUMABLE):
        sys.exit(status_code)


@cli.command("list")
@click.argument("url")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line.")
@endpoint_option
def list_command(url: str, endpoint_url: str | None, *, as_json: bool) -> None:
    """List the outputs below URL, and how far each is."""
    from pipeline.console.tables import show_outputs
    from pipeline.runs.listing import list_outputs

    found = []
    for row in list_outputs(url, endpoint_url):
        found.append(row)
        if as_json:
            click.echo(json.dumps(row))
    if not found:
        raise OutputError(f"output {url}: there is no Hessian there, nor below")
    if not as_json:
        show_outputs(found)


def _verify_chunks(url: str, endpoint_url: str | None) -> None:
    """Read back what is there, and list what is at fault."""
    from pipeline.errors import VerificationError
    from pipeline.results.receipt_audit import REMEDY, audit_output, listed_faults

    found = audit_output(url, endpoint_url)
    objects, faults = sum(a.objects for a in found), sum(len(a.faults) for a in found)
    for line in listed_faults(found):
        click.echo(shown(line))
    if faults:
        raise VerificationError(
            f"output {url}: {counted(faults, 'fault')} in {counted(objects, 'object')} of "
            f"{counted(len(found), 'tile')}; {REMEDY}"
        )
    click.echo(f"{counted(objects, 'object')} of {counted(len(found), 'tile')} are what their receipts say")
