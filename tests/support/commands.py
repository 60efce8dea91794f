"""The `hessian` command, run in the process of a test."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from pipeline import cli


def command(*arguments):
    """Run the command in this process: status, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hessian", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as end:
            return end.code or 0, out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


def refused(*arguments):
    """The one line that a command ends with, and status 2."""
    status, _, said = command(*arguments)
    assert status == 2, said
    (line,) = said.splitlines()
    return line


def write_job(folder, factories):
    """Write a job of the factory `good`, to be computed in its own process; give the folder."""
    (folder / "made.py").write_text(factories)
    (folder / "job.yaml").write_text("problem: made.py:good\noutput: out\nexecutor: serial\n")
    return folder
