"""Who holds a lease and what was told in it, as it is read back: data of a stranger."""

import time
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from pipeline.storage.output import NOTE_BYTES, Output
from pipeline.storage.receipts import LAST_MOMENT
from pipeline.storage.records import read_or_none

LEASE_SECONDS = 60.0  # of silence, after which the next driver may take over

_Seconds = Annotated[float, Field(ge=0, le=LAST_MOMENT)]
_Count = Annotated[int, Field(ge=0, lt=2**53)]


class _Note(BaseModel):
    """What is known here of it; all may be missing, and there may be more, in leases of other versions."""

    model_config = ConfigDict(frozen=True, strict=True)


class Told(_Note):
    """How a driver said that it goes; see `Tally`."""

    tiles: _Count = 0
    before: _Count = 0
    done: _Count = 0
    seconds: _Seconds = 0.0
    workers: _Count = 0
    lost: dict[str, _Count] = {}
    set_aside: dict[str, str] = {}
    errors: tuple[str, ...] = ()


class Holder(_Note):
    """Who holds a lease, and what it told.

    Attributes:
        token: of this lease alone.
        since: seconds since the epoch; None where that is not known.
        host: name of the machine.
        machine: a boot of it, and a space of process numbers in it.
        pid: of the process.
        born: when it began, seconds since the epoch.
        released: whether the lease was given back.
        state: how it goes.
    """

    token: str = ""
    since: _Seconds | None = None
    host: str = "somebody"
    machine: str | None = None
    pid: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    born: _Seconds | None = None
    released: bool = False
    state: Told = Told()

    @property
    def process(self) -> str:
        """The process."""
        return f"process {'?' if self.pid is None else self.pid}"

    @property
    def moment(self) -> str:
        """Since when."""
        if self.since is None:
            return "nobody knows when"
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))


@dataclass(frozen=True)
class Held:
    """A lease as it is read.

    Attributes:
        holder: who holds it, or held it last; nothing is known of one that cannot be understood.
        silent: seconds since it was put, by the store's clock as far as it can be asked; None where it is gone.
    """

    holder: Holder
    silent: float | None

    @property
    def is_live(self) -> bool:
        """Whether its holder is at work, as far as can be told."""
        return not self.holder.released and is_fresh(self.silent)


def is_fresh(silent: float | None) -> bool:
    """Whether a sign of life is too young for its holder to be followed.

    Args:
        silent: seconds since it was given, by the store's clock; None where it is gone. Below zero the store's clock
            went back, which the next sign of life would end, or somebody set the time of the object.

    Returns:
        Whether it is.
    """
    return silent is not None and abs(silent) < LEASE_SECONDS


def read_holder(output: Output, name: str) -> Holder | None:
    """Read who holds a lease.

    Args:
        output: that it is of.
        name: of the lease.

    Returns:
        The holder; None where there is no such lease, or it cannot be understood.
    """
    return read_or_none(output, name, _HOLDER, NOTE_BYTES)


_HOLDER = TypeAdapter(Holder)
