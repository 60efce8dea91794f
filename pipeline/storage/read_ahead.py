"""Several things at a time and a few ahead of their use, in order and in bounded memory."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

READERS = 4  # threads that read and decode
MORE = 2  # results than these, made before they are asked for

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(function: Callable[[Item], Result], items: Iterable[Item], readers: int = READERS) -> Iterator[Result]:
    """Call a function with each of many items, on several threads.

    Args:
        function: what to call; it waits for a store, as a rule.
        items: taken as they are needed.
        readers: threads.

    Yields:
        What it returned for each, in the order of the items.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(readers, thread_name_prefix="hessian-reader") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > readers + MORE:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Room(threading.local):
    """Room for a matrix in each thread, used again and again: fresh pages cost more than decoding or casting into it.

    Args:
        shape: of the matrix.
        dtype: of its entries.
    """

    def __init__(self, shape: tuple[int, int], dtype: npt.DTypeLike) -> None:
        self.values: npt.NDArray[Any] = np.empty(shape, dtype)
