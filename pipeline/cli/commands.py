"""Commands that compute: from a job to a finished output, here or on a cluster."""

import sys
from pathlib import Path

import click

from pipeline.cli.group import address_option, cli, endpoint_option, job_argument, log_option, set_option
from pipeline.errors import counted, human_bytes, shown


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
@job_argument
@click.option("--preflight", is_flag=True, help="Show what preflight found: the errors seen and the engines tried.")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Plan for so many workers, here or elsewhere.")
@click.option("--profile", "device", metavar="DEVICE", help="Their kind: h100, a100, l4, cpu ...; else this machine's.")
@click.option("--receipts", metavar="URL", help="Calibrate by the tiles of a run of the same network.")
@set_option
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


@cli.command("cache")
@click.option("--clear", is_flag=True, help="Forget it: the next run measures anew.")
def cache_command(*, clear: bool) -> None:
    """Say what plans remember of how fast networks are on this machine."""
    from pipeline.preflight.remembered import ENVIRONMENT, folder, forget, kept

    if (place := folder()) is None:
        click.echo(f"nothing is remembered: {ENVIRONMENT} is set, and empty")
        return
    files = kept()
    size = human_bytes(sum(path.stat().st_size for path in files))
    click.echo(
        f"{counted(forget(), 'network')} forgotten"
        if clear
        else f"{counted(len(files), 'network')}, {size}, in {place}"
    )


@cli.command("run")
@job_argument
@click.option("--output", metavar="URL", help="Where the Hessian goes, in place of the spec's output.")
@click.option("--check", is_flag=True, help="Read back what is there already; compute again what is damaged.")
@click.option("--overwrite", is_flag=True, help="Replace what is there of a run; leave it out to go on with one.")
@endpoint_option
@log_option
@set_option
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
    from pipeline.console.tables import open_console, show_outcome
    from pipeline.progress.bar import ConsoleReporter
    from pipeline.runs.api import run_job  # takes seconds to import, by torch: a fault in the spec is said before

    console = open_console(stderr=True)
    with log_to(console, log):
        show_outcome(run_job(spec, job.parent, ConsoleReporter(console), check=check, overwrite=overwrite))


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
@job_argument
@address_option
@click.option("--output", metavar="URL", help="Where the Hessian goes, in place of the spec's output.")
@click.option("--detach", is_flag=True, help="Do not wait for it; print its id.")
@set_option
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
@log_option
def run_due_command(schedule: Path, log: Path | None) -> None:
    """Compute the Hessian of every checkpoint that SCHEDULE names and that has none yet.

    Run it as often as you like, by cron or a Kubernetes CronJob: what is done is skipped, what was cut off goes on.
    """
    from pipeline.runs.schedule import load_schedule

    load_schedule(schedule)  # a fault in it is said before torch is imported, which takes seconds
    from pipeline.console.logs import log_to
    from pipeline.console.tables import open_console, show_values
    from pipeline.progress.bar import ConsoleReporter
    from pipeline.runs.sweep import run_due

    console = open_console(stderr=True)
    with log_to(console, log):
        show_values(vars(run_due(schedule, ConsoleReporter(console))).items())


@cli.command("cancel")
@click.argument("job_id", metavar="ID")
@address_option
def cancel_command(job_id: str, address: str | None) -> None:
    """End the job of that ID on a Ray cluster; what is finished is kept."""
    from pipeline.cluster.job_client import Cluster

    click.echo(Cluster(address, _say).cancel(job_id))


def _say(text: str) -> None:
    click.echo(shown(text, keep="\n"), err=True)
