"""Attempts on hostile data, made in another process, and what came of them."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

TRIAL = Path(__file__).with_name("trial.py")


@dataclass(frozen=True)
class Came:
    """What came of an attempt.

    Attributes:
        kind: `answer`, `one line` or `fault`.
        said: the answer, or the line with its exit status before it.
        seconds: it took.
        bytes: of memory, beyond what the process had before.
    """

    kind: str
    said: object
    seconds: float
    bytes: int


@dataclass
class Attempts:
    """A process that makes attempts, and a count of them."""

    process: subprocess.Popen
    counts: Counter = field(default_factory=Counter)
    worst_seconds: float = 0.0
    worst_bytes: int = 0
    of_test: list[Came] = field(default_factory=list)  # that runs

    @classmethod
    def begin(cls):
        # Arrow's own pool reserves as much address space as an attempt may have.
        environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return cls(subprocess.Popen([sys.executable, TRIAL], env=environment, **pipes))

    def make(self, deed, **order):
        """Make one, and count it."""
        self.process.stdin.write(json.dumps({"deed": deed, **order}) + "\n")
        self.process.stdin.flush()
        came = Came(**json.loads(self.process.stdout.readline()))
        self.of_test.append(came)
        self.counts[came.kind] += 1
        self.worst_seconds, self.worst_bytes = max(self.worst_seconds, came.seconds), max(self.worst_bytes, came.bytes)
        return came

    def end(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def told(self):
        """Say all in one line."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()))
        return f"{kinds}; worst {self.worst_seconds:.2f} s, {self.worst_bytes / 2**20:.0f} MiB"


def refusal(came, *codes):
    """The line that an attempt was refused with, and one of these exit statuses."""
    assert came.kind == "one line", came
    code, _, line = came.said.partition(" ")
    assert int(code) in (codes or (1, 2, 75)), came
    return line


def copied(store, folder):
    """A fresh copy of a store."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(store, folder)
    return folder
