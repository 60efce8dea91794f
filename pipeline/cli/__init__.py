"""The `hessian` command. Exit status: 0 done, 1 failed, 2 bad input, 75 cut off (run the same command again)."""

import signal
import sys
import threading

import click

from pipeline.cli import commands, outputs  # noqa: F401 (they add themselves to the group)
from pipeline.cli.group import cli
from pipeline.errors import RESUMABLE, HessianError, Terminated
from pipeline.planning.torch_environment import prepare_environment

__all__ = ["cli", "main"]


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
