"""Records go to the console from warnings on, and all to the file; no secret does, nor what a terminal acts on."""

import io
import json
import logging

import pytest
from rich.console import Console

from pipeline import OutputError
from pipeline.console.logs import log_to

LOG = logging.getLogger("pipeline.some.module")


def logged(file=None):
    text = io.StringIO()
    with log_to(Console(file=text, width=200), file):
        LOG.debug("a detail", extra={"event": "detail", "tiles": 3})
        LOG.warning("to s3://key:secret@bucket/out \x1b[31mred")
    return text.getvalue()


def test_console():
    shown = logged()
    assert "a detail" not in shown
    assert "secret" not in shown
    assert "\x1b" not in shown
    assert "\\x1b[31mred" in shown


def test_file(tmp_path):
    logged(tmp_path / "log")
    logged(tmp_path / "log")  # appended
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["levelname"] for line in lines] == ["DEBUG", "WARNING"] * 2
    assert (lines[0]["event"], lines[0]["tiles"], lines[0]["name"]) == ("detail", 3, "pipeline.some.module")
    assert "secret" not in (tmp_path / "log").read_text()


def test_all_is_as_before_afterwards(tmp_path):
    logger = logging.getLogger("pipeline")
    before = logger.level, list(logger.handlers)
    logged(tmp_path / "log")
    assert (logger.level, logger.handlers) == before


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match=r"log .*: No such file or directory"):
        logged(tmp_path / "not there" / "log")
