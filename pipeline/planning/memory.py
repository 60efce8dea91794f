"""Memory projected before anything runs, and refused when it would not fit."""

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.errors import MemoryRefusedError, human_bytes

PROCESS_BYTES = 512 * 2**20  # a worker process with torch, ray and zarr imported: 360 to 450 MiB resident, measured
BUFFERED_TILES = 2  # one being computed, one being written
CHUNKS_IN_WRITER = 6  # copies of each chunk while it is written: itself, its mirror, and each while it is encoded
# More for Parquet: Arrow's allocator keeps what an encoded column needed (levels, pages, the file) beside the heap of
# the C library. 1.7 to 4.1 chunks were resident beyond Zarr's own (512 to 2,048 a side), and 20 MiB whatever the size.
CHUNKS_IN_PARQUET = 4
SCRATCH = 1.3  # resident over counted bytes: scratch space inside operators
# The C library keeps freed blocks below 32 MiB in its heap, which fragments under engines that allocate a few sizes in
# turn: up to 5.4 times the counted bytes were resident, measured. Handing each block back at once halves the speed.
HEAP_SLACK = 5
HEAP_BYTES = 64 * 2**20  # engines that count more than this allocate blocks that the heap does not keep
SHARE_OF_FREE = 0.8
FLOAT_BYTES = {"float32": 4, "float64": 8}


@dataclass(frozen=True)
class WorkerMemory:
    """What one worker holds at its peak, in bytes, term by term.

    Attributes:
        problem_bytes: weights and data.
        tile_bytes: the largest tile.
        writer_bytes: copies of chunks, see `writer_bytes`.
        engine_bytes: measured peak of the engine on one row group of one micro-batch, output not counted.
        tile: the largest tile's name and shape, for messages.
        on_gpu: whether engines run on a device with memory of its own.
        leaving_bytes: of the largest tile as it leaves a GPU, see `leaving_bytes`; 0 on a CPU.
    """

    problem_bytes: int
    tile_bytes: int
    writer_bytes: int
    engine_bytes: int
    tile: str
    on_gpu: bool = False
    leaving_bytes: int = 0

    @property
    def host_engine_bytes(self) -> int:
        """What the engine keeps resident in the process."""
        return 0 if self.on_gpu else resident_bytes(self.engine_bytes)

    @property
    def device_bytes(self) -> int:
        """What lies on the GPU: weights and all data, one tile, the one before as it leaves, the engine."""
        return self.problem_bytes + self.tile_bytes + self.leaving_bytes + int(SCRATCH * self.engine_bytes)

    @property
    def buffer_bytes(self) -> int:
        """What holds tiles in the process: as they are computed, or as they arrive from a GPU."""
        return BUFFERED_TILES * (self.leaving_bytes if self.on_gpu else self.tile_bytes)

    @property
    def total_bytes(self) -> int:
        """Sum of all terms in the process."""
        return (
            PROCESS_BYTES
            + 2 * self.problem_bytes  # as it arrived, and in the type and on the device it is computed in
            + self.buffer_bytes
            + self.writer_bytes
            + self.host_engine_bytes
        )

    def fits(self, allowed_bytes: int, allowed_device_bytes: int | None = None) -> bool:
        """Whether there is room for all; see `require`."""
        on_device = allowed_device_bytes is None or self.device_bytes <= allowed_device_bytes
        return on_device and self.total_bytes <= allowed_bytes

    def require(self, allowed_bytes: int, allowed_device_bytes: int | None = None) -> None:
        """Refuse a plan whose worst tile does not fit.

        Args:
            allowed_bytes: what a worker may hold.
            allowed_device_bytes: what it may hold on its GPU; None where it has none.

        Raises:
            MemoryRefusedError: projected is more than allowed.
        """
        if allowed_device_bytes is not None and self.device_bytes > allowed_device_bytes:
            raise MemoryRefusedError(
                f"tile {self.tile} would need {human_bytes(self.device_bytes)} on the GPU "
                f"(weights and data {human_bytes(self.problem_bytes)}, "
                f"tile {human_bytes(self.tile_bytes + self.leaving_bytes)}, "
                f"engine {human_bytes(SCRATCH * self.engine_bytes)}), allowed are {human_bytes(allowed_device_bytes)}: "
                "raise `gpus_per_worker`, or lower `chunk`, `tile`, `row_group` or `microbatch`"
            )
        if self.total_bytes > allowed_bytes:
            raise MemoryRefusedError(
                f"tile {self.tile} would need {human_bytes(self.total_bytes)} in a worker "
                f"(process {human_bytes(PROCESS_BYTES)}, weights and data {human_bytes(2 * self.problem_bytes)}, "
                f"tiles {human_bytes(self.buffer_bytes)}, "
                f"writer {human_bytes(self.writer_bytes)}, "
                f"engine {human_bytes(self.host_engine_bytes)}), "
                f"allowed are {human_bytes(allowed_bytes)}: "
                "raise `memory`, or lower `workers`, `chunk`, `tile`, `row_group` or `microbatch`"
            )


def leaving_bytes(entries: int, itemsize: int, symmetry: str) -> int:
    """Return the bytes of so many entries as they leave a GPU: in the stored type, with their mirror images."""
    return entries * itemsize * (2 if symmetry == "mirrored" else 1)


def writer_bytes(chunk_bytes: int, formats: Sequence[str]) -> int:
    """Return the memory that a writer of chunks of so many bytes needs, in these formats."""
    return (CHUNKS_IN_WRITER + ("parquet" in formats) * CHUNKS_IN_PARQUET) * chunk_bytes


def resident_bytes(engine_bytes: int) -> int:
    """Return the memory that an engine of so many counted bytes keeps resident."""
    return int(SCRATCH * engine_bytes + HEAP_SLACK * min(engine_bytes, HEAP_BYTES))


def engine_budget_bytes(free_bytes: int) -> int:
    """Return the counted bytes of an engine that stays within so much resident memory; inverts `resident_bytes`."""
    return int(max(free_bytes / (SCRATCH + HEAP_SLACK), (free_bytes - HEAP_SLACK * HEAP_BYTES) / SCRATCH))


def available_bytes() -> int:
    """Return the bytes free on this machine, or left to its control group or this process where that is less."""
    free = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    process = psutil.Process().memory_info()
    for kind, held in ((resource.RLIMIT_AS, "vms"), (resource.RLIMIT_DATA, "data")):
        most, _ = resource.getrlimit(kind)
        if most != resource.RLIM_INFINITY:
            free = min(free, most - getattr(process, held))
    return free


def allowed_bytes(memory: int | None, workers: int) -> int:
    """Return what one worker may hold.

    Args:
        memory: the setting, in bytes.
        workers: how many share this machine.

    Returns:
        The setting, or a worker's share of what is free.
    """
    return memory if memory is not None else int(SHARE_OF_FREE * available_bytes() / workers)
