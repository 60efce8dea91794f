"""What torch reads from the environment once, in a command or a worker before it is first used."""

import os
from pathlib import Path

TRANSPARENT_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# Turns of a loop, some 10 microseconds, that a thread of OpenMP spins for more work before it sleeps. Its own default,
# milliseconds, keeps the other processes of a busy machine from the core, one's own other thread among them: planning
# digits beside four busy processes took 22 CPU seconds so, and 7 with this.
SPINS = "5000"


def prepare_environment() -> None:
    """Have torch ask for large pages and OpenMP spin briefly, in this process and its children.

    What the environment says already is left. A page fault is then for 2 MiB in place of 4 KiB. torch looks at the
    first when it first allocates a tensor, at the second when it is imported: later calls change nothing.
    """
    if TRANSPARENT_PAGES.exists():  # torch warns where the system knows of no such pages
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
