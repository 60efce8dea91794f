"""The lease: one driver at a time on an output, and the driver's word on how it goes.

A lease is a numbered object. Whoever makes the next number holds it, by a conditional put of which the store lets one
win, and puts it again and again as a sign of life. A holder that stays silent is followed by the next number. How long
it was silent is told by the store's own clock, at which no machine's can be wrong.
"""

import json
import logging
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from pipeline.errors import LeaseError, OutputError
from pipeline.runs.holder import LEASE_SECONDS, Held, Holder, is_fresh, read_holder
from pipeline.storage.output import LEASE, NOTE_BYTES, Output
from pipeline.storage.run_files import read_manifest

BEAT_SECONDS = 10.0  # between signs of life; Google's stores take one change of an object a second

_NAME = re.compile(r"([0-9]{1,12})\.json")
_log = logging.getLogger(__name__)


class Lease:
    """Holds an output while it is a context.

    Args:
        output: what to hold.
        state: gives what is told beside the sign of life.

    Raises:
        LeaseError: on entering, another driver holds it.
    """

    def __init__(self, output: Output, state: Callable[[], Mapping[str, Any]]) -> None:
        self._output, self._state = output, state
        self._holder = {"token": uuid.uuid4().hex, "since": time.time(), **_process()}
        self._number = 0
        self._lost = False
        self._over = threading.Event()
        self._beat = threading.Thread(target=self._keep, name="hessian-lease", daemon=True)

    def __enter__(self) -> "Lease":
        number, holder = _latest(self._output)
        if holder is not None:
            self._require_free(number, holder)
        self._number = number + 1
        if not self._take():
            raise LeaseError(f"output {self._output.url}: another driver took it a moment ago")
        for older in _numbers(self._output):
            if older < self._number:
                self._output.delete(_name(older))
        self._beat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        if kind is not None:
            self._output.give_up()  # who is told to end has seconds, and a store that is away is waited for minutes
        self._beat.join()
        if self._lost:
            return
        try:
            self._give_back()
        except OutputError as error:  # raised, it would hide why the run ends
            _log.warning("the lease was not given back, it ends after %.0f s: %s", LEASE_SECONDS, error)

    def check(self) -> None:
        """Raise where another driver has taken over.

        Raises:
            LeaseError: it has.
        """
        if self._lost:
            raise LeaseError(
                f"output {self._output.url}: another driver took it over, after this one could not be heard for "
                f"{LEASE_SECONDS:.0f} s; finished tiles are kept"
            )

    def _require_free(self, number: int, holder: Holder) -> None:
        """Refuse while the holder lives."""
        if holder.released or _is_dead(holder):
            return
        silent = self._output.age(_name(number))
        if is_fresh(silent):
            raise LeaseError(
                f"output {self._output.url}: {holder.host} ({holder.process}) is at work on it since {holder.moment} "
                f"and was heard {silent:.0f} s ago; wait for it, or end it: its lease ends after {LEASE_SECONDS:.0f} s "
                "of silence"
            )

    def _take(self) -> bool:
        """Put the first sign of life; an answer may be lost and the put repeated, so its author decides."""
        name = _name(self._number)
        if self._output.create(name, self._content()):
            return True
        found = read_holder(self._output, name)
        return found is not None and found.token == self._holder["token"]

    def _keep(self) -> None:
        """Put signs of life; a store that does not answer is asked again at the next."""
        while not self._over.wait(BEAT_SECONDS):
            try:
                if max(_numbers(self._output), default=0) > self._number:
                    self._lost = True
                    return
                self._put()
            except OutputError as error:
                _log.warning("no sign of life could be given: %s", error)

    def _give_back(self) -> None:
        """Say that the output is free; where nothing was begun, or there is no room to say so, by leaving nothing."""
        try:
            begun = read_manifest(self._output) is not None
            if begun:
                self._put(released=True)
        except OutputError:
            begun = False
        if not begun:
            self._output.delete(_name(self._number))

    def _put(self, *, released: bool = False) -> None:
        self._output.put(_name(self._number), self._content(released=released))

    def _content(self, *, released: bool = False) -> bytes:
        return json.dumps({**self._holder, "released": released, "state": dict(self._state())}).encode()


def read_lease(output: Output) -> Held | None:
    """Read who holds an output, or held it last.

    Args:
        output: any.

    Returns:
        The lease; None where nobody ever did.
    """
    number, holder = _latest(output)
    return None if holder is None else Held(holder, output.age(_name(number), ask=False))


def _latest(output: Output) -> tuple[int, Holder | None]:
    """Return the highest number, and who holds it; nothing known of its holder where that cannot be understood."""
    number = max(_numbers(output), default=0)
    while output.get(_name(number + 1), NOTE_BYTES) is not None:  # a listing may be old
        number += 1
    return number, (read_holder(output, _name(number)) or Holder()) if number else None


def _numbers(output: Output) -> list[int]:
    return [int(found[1]) for name in output.sizes(LEASE) if (found := _NAME.fullmatch(name))]


def _name(number: int) -> str:
    return f"{LEASE}/{number:08d}.json"


def _process() -> dict[str, Any]:
    """Name this process so that another on the same machine can tell whether it lives."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    return {
        "host": platform.node(),
        "machine": f"{boot.read_text().strip()}/{os.readlink(space)}" if boot.exists() and space.exists() else None,
        "pid": os.getpid(),
        "born": psutil.Process().create_time(),
    }


def _is_dead(holder: Holder) -> bool:
    """Whether a holder is a process of this machine that has ended; False where that cannot be known."""
    ours = _process()
    if ours["machine"] is None or holder.machine != ours["machine"] or holder.pid is None or holder.born is None:
        return False
    try:
        return bool(psutil.Process(holder.pid).create_time() != holder.born)
    except psutil.NoSuchProcess:
        return True
