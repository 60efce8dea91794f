"""The `hessian` command. Exit status: 0 done, 1 failed, 2 bad input, 75 cut off (run the same command again)."""

import json
import signal
import sys
import threading
from pathlib import Path
from typing import Literal

import click

from pipeline.errors import BAD_INPUT, FAILED, RESUMABLE, HessianError, OutputError, Terminated, counted, shown
from pipeline.planning.torch_environment import prepare_environment

_set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a key of the job spec; may be repeated."
)
_endpoint_option = click.option("--endpoint-url", help="Server of the bucket, where it is not the cloud's own.")
_address_option = click.option(
    "--address", metavar="URL", help="The cluster's dashboard, as http://127.0.0.1:8265, where it is else looked for."
)
_log_option = click.option(
    "--log", type=click.Path(path_type=Path), metavar="FILE", help="Append what happens, a JSON object a line."
)
_job_argument = click.argument("job", type=click.Path(path_type=Path))


class _Command(click.Command):
    """Listed by its whole first sentence, which click would cut."""

    def get_short_help_str(self, limit: int = 1000) -> str:
        """Return it."""
        return super().get_short_help_str(max(limit, 1000))


class _Commands(click.Group):
    command_class = _Command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hessian-pipeline", prog_name="hessian")
def cli() -> None:
    """Compute the full, exact Hessian of a PyTorch model's loss."""


@cli.command("init")
@click.argument("name", required=False)
def init_command(name: str | None) -> None:
    """Copy the job NAME that comes with this package into this folder; without a NAME, list them."""
    from pipeline.console.tables import show_values
    from pipeline.runs.examples import copy_example, list_examples

    if name is None:
        show_values(list_examples().items())
        return
    for path in copy_example(name, Path()):
        click.echo(path)
    click.echo(f"next: hessian run {name}.yaml")


@cli.command("plan")
@_job_argument
@click.option("--preflight", is_flag=True, help="Show what preflight found: the errors seen and the engines tried.")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Plan for so many workers, here or elsewhere.")
@click.option("--profile", "device", metavar="DEVICE", help="Their kind: h100, a100, l4, cpu ...; else this machine's.")
@click.option("--receipts", metavar="URL", help="Calibrate by the tiles of a run of the same network.")
@_set_option
def plan_command(
    job: Path,
    overrides: tuple[str, ...],
    workers: int | None,
    device: str | None,
    receipts: str | None,
    *,
    preflight: bool,
) -> None:
    """Say what running JOB would do, and whether it would fit; starts nothing."""
    if device is not None and receipts is not None:
        raise click.UsageError("--receipts say how fast their workers are: leave out --profile")
    from pipeline.planning.machine_profiles import find_profile
    from pipeline.spec import load_job

    profile, spec = find_profile(device) if device else None, load_job(job, overrides)
    from pipeline.console.tables import show_forecast, show_plan, show_preflight
    from pipeline.runs.api import plan  # takes seconds to import, by torch: a fault in the spec is said before
    from pipeline.storage.output import Output, open_readable

    measured = open_readable(receipts, spec.output or receipts, spec.endpoint_url) if receipts else None
    made = plan(spec, job.parent, workers, profile)
    if preflight:
        show_preflight(made)
    forecast = bool(workers or profile or measured)
    show_plan(made, timed=not forecast)
    if forecast:
        show_forecast(made, profile, measured)
    if spec.output is not None:
        Output(spec.output, spec.endpoint_url).check_room(made.stored_bytes, made.smaller)


@cli.command("run")
@_job_argument
@click.option("--output", metavar="URL", help="Where the Hessian goes, in place of the spec's output.")
@click.option("--check", is_flag=True, help="Read back what is there already; compute again what is damaged.")
@click.option("--overwrite", is_flag=True, help="Replace what is there of a run; leave it out to go on with one.")
@_endpoint_option
@_log_option
@_set_option
def run_command(
    job: Path,
    output: str | None,
    endpoint_url: str | None,
    log: Path | None,
    overrides: tuple[str, ...],
    *,
    check: bool,
    overwrite: bool,
) -> None:
    """Run JOB, go on with it where it was cut off, or find it finished."""
    if check and overwrite:
        raise click.UsageError("--check mends what is there, --overwrite replaces it: leave one of them out")
    from pipeline.spec import load_job

    spec = load_job(job, overrides, output, endpoint_url)
    from pipeline.console.logs import log_to
    from pipeline.console.reporter import ConsoleReporter
    from pipeline.console.tables import open_console, show_outcome
    from pipeline.runs.api import run_job  # takes seconds to import, by torch: a fault in the spec is said before

    console = open_console(stderr=True)
    with log_to(console, log):
        show_outcome(run_job(spec, job.parent, ConsoleReporter(console), check=check, overwrite=overwrite))


@cli.command("verify")
@click.argument("url")
@click.option("--job", type=click.Path(path_type=Path), help="The job spec; without it only chunks are checked.")
@click.option("--chunks", is_flag=True, help="Only read back what is there, of an unfinished run as well.")
@_set_option
@_endpoint_option
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
@_endpoint_option
def export_command(url: str, dest: str | None, kind: Literal["parquet", "npy"], endpoint_url: str | None) -> None:
    """Write the finished Hessian at URL in another format, to DEST.

    Parquet goes into the output itself where no DEST is given; a .npy file needs a local one.
    """
    from pipeline.console.reporter import ConsoleReporter
    from pipeline.console.tables import open_console
    from pipeline.results.export import export_hessian

    reporter = ConsoleReporter(open_console(stderr=True))
    click.echo(export_hessian(url, kind, dest, endpoint_url=endpoint_url, report=reporter))


@cli.command("report")
@click.argument("url")
@_endpoint_option
def report_command(url: str, endpoint_url: str | None) -> None:
    """Draw how large the blocks of the finished Hessian at URL are, into its output."""
    from pipeline.analysis.report import write_report

    click.echo(write_report(url, endpoint_url))


@cli.command("spectrum")
@click.argument("url")
@click.option("--k", type=click.IntRange(1), help="Eigenvalues, the largest in absolute value.  [default: 20]")
@click.option("--density", is_flag=True, help="Estimate how many eigenvalues are in each decade; any size.")
@click.option("--whole", is_flag=True, help="All eigenvalues, with signs, rank and condition number; in memory.")
@click.option("--params", multiple=True, metavar="GLOB", help="Of these parameters alone, !GLOB excludes; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print an object for scripts.")
@_endpoint_option
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
    from pipeline.console.reporter import ConsoleReporter
    from pipeline.console.tables import open_console, show_spectrum

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
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_endpoint_option
def status_command(url: str, endpoint_url: str | None, *, as_json: bool) -> None:
    """Say how far the run at URL is.

    Exit status: 0 finished and proven, 1 unproven, 75 running or interrupted, 2 absent.
    """
    from pipeline.console.tables import show_status
    from pipeline.runs.status import status

    found = status(url, endpoint_url)
    if as_json:
        click.echo(json.dumps(found))
    elif found["state"] == "absent":
        raise OutputError(f"output {url}: holds no Hessian (no manifest.json)")
    else:
        show_status(found)
    if status_code := {"finished": 0, "unproven": FAILED, "absent": BAD_INPUT}.get(found["state"], RESUMABLE):
        sys.exit(status_code)


@cli.command("drain-on-notice")
@click.option("--cloud", type=click.Choice(["aws", "azure", "gcp"]), required=True, help="Whose machine this is.")
@click.option("--metadata-url", metavar="URL", help="Its metadata service, where it is not the cloud's own.")
@click.option("--address", help="The Ray cluster; the one that is running here when not given.")
@click.option("--node-id", help="The node; this machine's when not given.")
@click.option(
    "--interval",
    type=click.FloatRange(0, min_open=True),
    default=5.0,
    show_default=True,
    help="Seconds between questions.",
)
def drain_command(
    cloud: str, metadata_url: str | None, address: str | None, node_id: str | None, interval: float
) -> None:
    """Wait for the notice that the cloud takes this machine away; then have Ray drain its node."""
    from pipeline.cluster.preemption import drain_on_notice
    from pipeline.console.logs import log_to
    from pipeline.console.tables import open_console

    with log_to(open_console(stderr=True), None):
        left = drain_on_notice(cloud, metadata_url, address, node_id, interval)
    click.echo(f"the node is drained, {left:.0f} s before its end")


@cli.command("submit")
@_job_argument
@_address_option
@click.option("--output", metavar="URL", help="Where the Hessian goes, in place of the spec's output.")
@click.option("--detach", is_flag=True, help="Do not wait for it; print its id.")
@_set_option
def submit_command(
    job: Path, address: str | None, output: str | None, overrides: tuple[str, ...], *, detach: bool
) -> None:
    """Run JOB on a Ray cluster, and follow it until it ends; the same again follows the same job."""
    from pipeline.cluster.job_client import Cluster

    cluster = Cluster(address, _say)
    submitted = cluster.submit(job, overrides, output)
    _say(f"job {submitted.id} is {submitted.state}; its output is {submitted.output}")
    if detach or submitted.done:
        click.echo(submitted.id)
        return
    try:
        status = cluster.follow(submitted.id, lambda text: click.echo(text, nl=False))
    except KeyboardInterrupt:
        raise cluster.left(submitted) from None
    sys.exit(status)


@cli.command("run-due")
@click.argument("schedule", type=click.Path(path_type=Path))
@_log_option
def run_due_command(schedule: Path, log: Path | None) -> None:
    """Compute the Hessian of every checkpoint that SCHEDULE names and that has none yet.

    Run it as often as you like, by cron or a Kubernetes CronJob: what is done is skipped, what was cut off goes on.
    """
    from pipeline.runs.schedule import load_schedule

    load_schedule(schedule)  # a fault in it is said before torch is imported, which takes seconds
    from pipeline.console.logs import log_to
    from pipeline.console.reporter import ConsoleReporter
    from pipeline.console.tables import open_console, show_values
    from pipeline.runs.sweep import run_due

    console = open_console(stderr=True)
    with log_to(console, log):
        show_values(vars(run_due(schedule, ConsoleReporter(console))).items())


@cli.command("cancel")
@click.argument("job_id", metavar="ID")
@_address_option
def cancel_command(job_id: str, address: str | None) -> None:
    """End the job of that ID on a Ray cluster; what is finished is kept."""
    from pipeline.cluster.job_client import Cluster

    click.echo(Cluster(address, _say).cancel(job_id))


def main() -> None:
    """Run the command; errors of ours become one line and an exit status."""
    prepare_environment()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            # For the default one asyncio has another: the first Ctrl-C would wait for whatever does not await.
            signal.signal(signal.SIGINT, _interrupt)
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except HessianError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort) as stop:
        kept = str(stop.__cause__ or stop)  # click raises its own from Ctrl-C
        click.echo(f"interrupted: {kept or 'run the same command again'}", err=True)
        sys.exit(RESUMABLE)


def _terminate(*_: object) -> None:
    raise Terminated


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    click.echo(shown(text, keep="\n"), err=True)


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
