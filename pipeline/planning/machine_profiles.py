"""Kinds of workers: what a plan, or a simulation, takes for the speed of machines, at hand or not."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.errors import SpecError, nearest
from pipeline.spec import FloatName

GIB = 2**30
SHARE = (
    0.5  # of a data sheet's FLOP/s that tiles are assumed to reach; on CPUs 0.3 to 0.8 of the product's were measured
)
GPU_STORE_BYTES = 250e6  # a second to a bucket: four puts at a time at 60 to 90 MB/s each, as clouds' own guides say
CPU_STORE_BYTES = 150e6  # the same, where encoding takes the worker's only CPU
ENCODED_BYTES = {"none": 16e9, "lz4": 2.4e9, "zstd": 0.44e9}  # a second, by four threads on two cores (stores.json)
PINNED_SHARE = 0.8  # of what a bus carries by its data sheet, that copies into pinned memory reach
GPU_START_SECONDS = 30.0  # a process, torch, a CUDA context, weights and data; on a node that is up
CPU_START_SECONDS = 10.0  # 7.6 s were measured with two cores to themselves, 15 and more beside others


@dataclass(frozen=True)
class TileCost:
    """What a tile costs.

    Attributes:
        compute_seconds: on the machine that the plan was measured on.
        write_seconds: of encoding and putting it there.
        flops: of its matrix products and convolutions.
        tensor_flops: of those in TF32, for tensor cores.
        bytes: of its chunks in all formats, mirror images included, before compression.
        copied_bytes: of them, that a GPU makes and the host gets: once, whatever the formats.
        codec: of its chunks.
    """

    compute_seconds: float
    write_seconds: float
    flops: float
    tensor_flops: float
    bytes: int
    copied_bytes: int
    codec: str


@dataclass(frozen=True)
class Profile:
    """A kind of worker.

    Attributes:
        name: of the device.
        float32: FLOP/s of its float32 matrix product, TF32 off, by its data sheet.
        float64: likewise.
        tf32: likewise, of its tensor cores; as float32 where it has none.
        bus_bytes: that its bus carries to the host in a second, by its data sheet; None where it has no bus.
        store_bytes: that it puts in a second; where it has no bus, that it encodes and puts.
        start_seconds: until it computes its first tile.
        memory_bytes: of its host that it may hold.
        overlaps: whether writing costs no computing; not so where both need the same CPU.
        measured: seconds of computing and of writing a tile, over those that the plan measured; None where nothing was:
            then the data sheet and the assumptions above stand.
    """

    name: str
    float32: float
    float64: float
    tf32: float
    bus_bytes: float | None
    store_bytes: float
    start_seconds: float
    memory_bytes: int
    overlaps: bool = True
    measured: tuple[float, float] | None = None

    @property
    def calibrated(self) -> bool:
        """Whether its speed is that of measured tiles."""
        return self.measured is not None

    def phases(self, cost: TileCost, dtype: FloatName) -> dict[str, float]:
        """Predict the seconds of a tile, by what is done.

        Args:
            cost: of the tile.
            dtype: that it is computed in.

        Returns:
            Of computing, then of what writes it, one after the other: what is measured together is one of them.
        """
        if self.measured is not None:
            return {
                "computing": self.measured[0] * cost.compute_seconds,
                "writing": self.measured[1] * cost.write_seconds,
            }
        peak = self.float32 if dtype == "float32" else self.float64
        found = {"computing": (cost.flops / peak + cost.tensor_flops / self.tf32) / SHARE}
        if self.bus_bytes is None:
            return found | {"writing": cost.bytes / self.store_bytes}
        return found | {
            "copying to the host": cost.copied_bytes / (PINNED_SHARE * self.bus_bytes),
            "encoding": cost.bytes / ENCODED_BYTES[cost.codec],
            "putting": cost.bytes / self.store_bytes,
        }

    def seconds(self, cost: TileCost, dtype: FloatName) -> tuple[float, float]:
        """Return the seconds of computing a tile, and of writing it; see `phases`."""
        computing, *writing = self.phases(cost, dtype).values()
        return computing, sum(writing)

    def bottleneck(self, costs: Iterable[TileCost], dtype: FloatName) -> tuple[Mapping[str, float], str]:
        """Find what tiles wait for.

        Args:
            costs: of the tiles.
            dtype: that they are computed in.

        Returns:
            The seconds of all by what is done, and the name of what takes most: of computing and writing, where they
            overlap, of the one that takes longer.
        """
        total = Counter[str]()
        for cost in costs:
            total.update(self.phases(cost, dtype))
        writing = total.total() - total["computing"]
        hidden = self.overlaps and total["computing"] < writing
        if self.overlaps and not hidden:
            return total, "computing"
        return total, max(total, key=lambda name: 0.0 if hidden and name == "computing" else total[name])

    def describe(self) -> str:
        """Return in a line what is taken for its speed."""
        start = f"{self.start_seconds:.0f} s to start"
        if self.measured is not None:
            return f"{self.name}, calibrated by measured tiles, {start}"
        bus = f"{PINNED_SHARE * self.bus_bytes / 1e9:.3g} GB/s to the host, " if self.bus_bytes else ""
        return (
            f"{self.name}, NOT calibrated: {SHARE:.0%} of {self.float32 / 1e12:.3g} TFLOP/s in float32 and "
            f"{self.float64 / 1e12:.3g} in float64, {bus}{self.store_bytes / 1e6:.0f} MB/s to the store, {start}"
        )


def _gpu(name: str, float32: float, float64: float, tf32: float, bus: float, memory: int) -> Profile:
    rates = float32 * 1e12, float64 * 1e12, tf32 * 1e12, bus * 1e9
    return Profile(name, *rates, GPU_STORE_BYTES, GPU_START_SECONDS, memory * GIB)


# TFLOP/s by NVIDIA's data sheets, outside tensor cores for float32, with them for float64 where they do it, and in TF32
# of dense matrices; GB/s of 16 lanes of their PCI Express, one way; a share of the host's memory as clouds sell it with
# the device. A CPU core: 2.6 GHz x 32 operations (float64: 16), as with AVX2.
PROFILES = {
    profile.name: profile
    for profile in (
        _gpu("h200", 67, 67, 494, 64, 128),
        _gpu("h100", 67, 67, 494, 64, 128),
        _gpu("a100", 19.5, 19.5, 156, 32, 64),
        _gpu("v100", 15.7, 7.8, 15.7, 16, 32),
        _gpu("l40s", 91.6, 1.4, 183, 32, 32),
        _gpu("l4", 30.3, 0.47, 60, 32, 16),
        _gpu("a10g", 31.2, 0.49, 35, 32, 16),
        _gpu("t4", 8.1, 0.25, 8.1, 16, 16),
        Profile("cpu", 83e9, 42e9, 83e9, None, CPU_STORE_BYTES, CPU_START_SECONDS, 4 * GIB, overlaps=False),
    )
}


def find_profile(name: str) -> Profile:
    """Return the profile of a device.

    Args:
        name: as in `PROFILES`.

    Returns:
        The profile.

    Raises:
        SpecError: it is not known.
    """
    try:
        return PROFILES[name]
    except KeyError:
        raise SpecError(f"no profile `{name}`{nearest(name, PROFILES)}; there are {', '.join(PROFILES)}") from None


def at_hand(
    *, overlaps: bool, name: str = "workers like this machine's", measured: tuple[float, float] = (1.0, 1.0)
) -> Profile:
    """Return the profile of machines on which tiles were measured.

    Args:
        overlaps: whether writing costs no computing.
        name: for people.
        measured: seconds of computing and of writing a tile, over those of the plan.

    Returns:
        The profile.
    """
    start = GPU_START_SECONDS if overlaps else CPU_START_SECONDS
    return Profile(name, 0, 0, 0, None, 0, start, 0, overlaps, measured)
