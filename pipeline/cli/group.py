"""The group of commands, and the options that several of them have."""

from pathlib import Path

import click

set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a key of the job spec; may be repeated."
)
endpoint_option = click.option("--endpoint-url", help="Server of the bucket, where it is not the cloud's own.")
address_option = click.option(
    "--address", metavar="URL", help="The cluster's dashboard, as http://127.0.0.1:8265, where it is else looked for."
)
log_option = click.option(
    "--log", type=click.Path(path_type=Path), metavar="FILE", help="Append what happens, a JSON object a line."
)
job_argument = click.argument("job", type=click.Path(path_type=Path))


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
