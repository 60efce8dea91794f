"""Streams, events and memory of a CUDA device that is not there; see `pretended_cuda`.

What the device computes is computed at once. Copies to the host that nobody has to wait for are made as late as the
program allows: when it waits for them, or when it tells the stream that computes to do so. What reads them before, or
writes over what they are to take, is wrong here each time, and on a GPU now and then.
"""

import contextlib
import weakref
from collections import Counter

import torch


class RaceError(RuntimeError):
    """A stream takes what another one has written, and has not waited for it."""


class Stream:
    """A queue of copies.

    Args:
        device: it belongs to.
    """

    current: "Stream"

    def __init__(self, device=None, **_):
        self.queue, self.waited = [], 0

    def run(self, most=None):
        """Make the first so many copies that were not made yet."""
        for _ in range(len(self.queue) if most is None else most):
            self.queue.pop(0)()

    def wait_event(self, event):
        """Go on after what was recorded."""
        if event.stream is not self:
            event.run()
            self.waited = max(self.waited, event.written)

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self):
        DEVICE.note("stop", "stream")
        self.run()


class Event:
    """A mark in a stream."""

    def __init__(self, **_):
        self.stream, self.copies, self.written = None, [], 0

    def record(self, stream=None):
        self.stream = stream or Stream.current
        self.copies, self.written = list(self.stream.queue), DEVICE.ticks

    def run(self):
        if self.stream is not None:
            self.stream.run(sum(copy in self.copies for copy in self.stream.queue))

    def wait(self, stream=None):
        (stream or Stream.current).wait_event(self)

    def query(self):
        return not any(copy in self.copies for copy in self.stream.queue)

    def synchronize(self):
        DEVICE.note("wait", "event")
        self.run()


@contextlib.contextmanager
def on_stream(stream):
    """Queue what is called inside on a stream."""
    before, Stream.current = Stream.current, stream
    try:
        yield
    finally:
        Stream.current = before


class Device:
    """What was seen, and what memory is held.

    Attributes:
        seen: by kind, operation and line of the product.
        ticks: operations that have written.
        written: when each storage was, last.
    """

    def __init__(self):
        self.start(total=80 * 10**9)

    def start(self, total):
        self.seen, self.ticks, self.written, self.pinned = Counter(), 0, {}, set()
        self.total, self.allocated, self.peak, self._held = total, 0, 0, {}
        self.default = Stream.current = Stream()

    def note(self, kind, what):
        self.seen[kind, what, _place()] += 1

    def count(self, kind):
        return sum(count for (seen, _, _), count in self.seen.items() if seen == kind)

    def wrote(self, inner):
        self.ticks += 1
        self.written[inner.untyped_storage()._cdata] = self.ticks

    def require_waited(self, inner):
        """Refuse that a stream other than the one that computes takes what it has not waited for."""
        stream = Stream.current
        if stream is not self.default and self.written.get(inner.untyped_storage()._cdata, 0) > stream.waited:
            raise RaceError(f"a stream copies what another one has written since it waited, at {_place()}")

    def copy_later(self, copy):
        Stream.current.queue.append(copy)

    def pin(self, tensor):
        self.pinned.add(tensor.untyped_storage()._cdata)
        return tensor

    def is_pinned(self, tensor):
        return tensor.untyped_storage()._cdata in self.pinned

    def hold(self, wrapper, inner):
        """Count a tensor's memory for as long as any that shares it is alive."""
        storage = inner.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._held:
            if self.allocated + size > self.total:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes (pretended)")
            self._held[key] = [0, size]
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
        self._held[key][0] += 1
        weakref.finalize(wrapper, self._release, self._held, key).atexit = False

    def _release(self, held, key):
        held[key][0] -= 1
        if not held[key][0]:
            size = held.pop(key)[1]
            if held is self._held:
                self.allocated -= size

    def reset_peak(self, *_):
        self.peak = self.allocated

    def stop(self, *_):
        self.note("stop", "synchronize")
        self.default.run()


def _place():
    """Return the innermost line of the product."""
    import sys

    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/pipeline/" in name and "site-packages" not in name and not name.endswith("problem/modes.py"):
            return f"{name.rsplit('/pipeline/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"


DEVICE = Device()


def replacements():
    """Return what stands in for functions of torch.cuda."""
    device = DEVICE
    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": device.stop,
        "mem_get_info": lambda *_: (device.total - device.allocated, device.total),
        "get_device_name": lambda *_: "Pretended",
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
        "set_rng_state_all": lambda _: None,
        "memory_allocated": lambda *_: device.allocated,
        "max_memory_allocated": lambda *_: device.peak,
        "reset_peak_memory_stats": device.reset_peak,
        "empty_cache": lambda: None,
        "set_per_process_memory_fraction": lambda *_: None,
        "Stream": Stream,
        "Event": Event,
        "stream": on_stream,
        "current_stream": lambda *_: Stream.current,
        "default_stream": lambda *_: device.default,
    }
