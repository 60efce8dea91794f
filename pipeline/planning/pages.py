"""Large pages for torch's tensors on a CPU: a fault for 2 MiB in place of one for each 4 KiB."""

import os
from pathlib import Path

TRANSPARENT_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def ask_for_large_pages() -> None:
    """Have torch ask the system for large pages in this process and its children, unless the environment says.

    It looks at that when it first allocates a tensor: later calls change nothing.
    """
    if TRANSPARENT_PAGES.exists():  # torch warns where the system knows of no such pages
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
