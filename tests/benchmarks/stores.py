"""Codecs on a real Hessian, and stores against raw puts and gets of the same encoded objects.

    python tests/benchmarks/stores.py [--hidden N] [--repeats N] [--clouds NAME ...]

The Hessian of a network trained on real digits is written chunk by chunk as a worker writes it, and multiplied with a
vector; beside it the same objects are put and got by the same filesystem with as many threads, and the chunks are
encoded alone. On a disk the measure is bytes of chunks per second, writes until all is on the disk, reads with the
objects in the system's cache and without. On the servers that stand in for clouds, which are slower than any client, it
is this process's CPU seconds per GB. Medians of repeats, in turn; of ratios, of each turn's. Written to
`results/stores.json`.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import zarr

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "support"), str(HERE.parents[1]), str(HERE.parents[1] / "jobs")]

import clouds  # noqa: E402
import digits  # noqa: E402

from pipeline import compute_hessian  # noqa: E402
from pipeline.analysis.hessian import Hessian  # noqa: E402
from pipeline.storage.chunk_codec import ChunkCodec  # noqa: E402
from pipeline.storage.chunk_formats import store_chunk  # noqa: E402
from pipeline.storage.output import MATRIX, Output  # noqa: E402
from pipeline.storage.read_ahead import READERS  # noqa: E402
from pipeline.storage.zarr_store import MatrixStore, chunk_key  # noqa: E402

CHUNK, PUTS = 1024, 4
CODECS = ("none", "lz4", "zstd")


def timed(function, durable):
    """Wall and CPU seconds; `durable` until all is on the disk."""
    os.sync()
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    if durable:
        os.sync()
    return time.perf_counter() - wall, time.process_time() - cpu


def each(threads, function, items):
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(function, items):
            pass


class Trial:
    """One store and one codec, ours and raw, in turn."""

    def __init__(self, hessian, url, codec):
        self.url, self.size = url, hessian.shape[0]
        self.manifest = hessian.manifest.model_copy(update={"codec": codec, "symmetry": "upper"})
        side = self.manifest.plan.side
        self.keys = [(i, j) for i in range(side) for j in range(i, side)]
        self.chunks = {(i, j): hessian.store.read_chunk(i, j) for i, j in self.keys}  # each contiguous, as a worker's
        self.bytes = sum(chunk.nbytes for chunk in self.chunks.values())
        self.raw = Output(f"{url}/raw")
        self.make()
        self.write()
        stored = Output(f"{url}/ours")
        self.objects = {key: stored.get(f"{MATRIX}/{chunk_key(*key)}") for key in self.keys}

    def make(self):
        """An empty array: a file that replaces another takes longer."""
        shutil.rmtree(f"{self.url}/ours", ignore_errors=True)
        self.output = Output(f"{self.url}/ours")
        MatrixStore.create(self.output, self.manifest, np.zeros(self.size))
        self.store = MatrixStore(self.output, self.manifest)
        self.codec = ChunkCodec(self.manifest.codec, CHUNK, self.manifest.store_dtype)

    def write(self):
        each(PUTS, lambda key: store_chunk([self.store], self.manifest, *key, self.chunks[key]), self.keys)

    def encode(self):
        each(PUTS, lambda key: self.codec.encode(self.chunks[key]), self.keys)

    def put(self):
        """The same objects, encoded before."""
        each(PUTS, lambda key: self.raw.put(f"raw/{key[0]}-{key[1]}", self.objects[key]), self.keys)

    def multiply(self):
        hessian = Hessian(self.output, self.manifest)
        hessian @ np.ones(self.size, np.float32)

    def get(self):
        fs, root = self.raw._fs, self.raw.path("raw")
        each(READERS, lambda key: len(fs.cat_file(f"{root}/{key[0]}-{key[1]}")), self.keys)


def fill(folder, size):
    """Write and remove as many bytes, so that the system has pages at hand: a virtual machine's first use of a page
    takes longer than all else, and falls on whoever comes first."""
    with open(f"{folder}/filling", "wb") as file:
        for _ in range(size >> 22):
            file.write(bytes(1 << 22))
    os.remove(file.name)


def out_of_cache(folder):
    """Have the system forget the files of a folder."""
    os.sync()
    for path in Path(folder).rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def in_turn(trial, repeats, folder=None):
    """Wall and CPU seconds of each, `repeats` times in turn."""
    found = {}
    for _ in range(repeats):
        if folder is not None:
            shutil.rmtree(f"{folder}/raw", ignore_errors=True)
        trial.make()
        for name in ("encode", "write", "put", "multiply", "get"):
            if folder is not None:
                fill(folder, trial.bytes)
            found.setdefault(name, []).append(timed(getattr(trial, name), folder is not None))
            if folder is not None and name in {"multiply", "get"}:
                out_of_cache(folder)
                found.setdefault(f"{name}, not in cache", []).append(timed(getattr(trial, name), False))
    return found


def gigabytes_per_second(found, size):
    return {k: round(size / 1e9 / statistics.median(wall for wall, _ in times), 3) for k, times in found.items()}


def cpu_seconds_per_gigabyte(found, size):
    return {k: round(statistics.median(cpu for _, cpu in times) / size * 1e9, 3) for k, times in found.items()}


def ratio(found, ours, raw):
    """Speed of ours over raw: the median of what each turn gives, so that a disk's moods fall on both."""
    return round(statistics.median(b[0] / a[0] for a, b in zip(found[ours], found[raw], strict=True)), 3)


def on_disk(hessian, repeats):
    rows = []
    for codec in CODECS:
        with tempfile.TemporaryDirectory(prefix="stores-") as folder:
            if shutil.disk_usage(folder).free < 8 * hessian.manifest.layout.size**2 * 4:
                sys.exit(f"too little room in {folder}")
            trial = Trial(hessian, folder, codec)
            found = in_turn(trial, repeats, folder=folder)
            stored = sum(map(len, trial.objects.values()))
            row = {"codec": codec, "stored_of_raw": round(stored / trial.bytes, 4)}
            row["GB_per_second"] = gigabytes_per_second(found, trial.bytes)
            row["write_of_put"] = ratio(found, "write", "put")
            for suffix in ("", ", not in cache"):
                row[f"multiply_of_get{suffix}"] = ratio(found, f"multiply{suffix}", f"get{suffix}")
            print(row, flush=True)
            rows.append(row)
    return rows


def on_clouds(hessian, repeats, names):
    rows = []
    for name in names:
        with clouds.CLOUDS[name]() as cloud:
            os.environ.update(cloud.environment)
            trial = Trial(hessian, f"{cloud.url}/bench", "lz4")
            found = in_turn(trial, repeats)
            row = {"server": name, "codec": "lz4"}
            row["cpu_seconds_per_GB"] = cpu_seconds_per_gigabyte(found, trial.bytes)
            row["GB_per_second"] = gigabytes_per_second(found, trial.bytes)
            print(row, flush=True)
            rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=95)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clouds", nargs="*", default=["moto", "google", "azure"])
    options = parser.parse_args()
    hessian = compute_hessian(digits.mlp(hidden=options.hidden), executor="serial", chunk=CHUNK, verify=False)
    found = {
        "environment": {"zarr": zarr.__version__, "machine": platform.machine(), "cpus": os.cpu_count()},
        "P": hessian.shape[0],
        "chunk": CHUNK,
        "puts": PUTS,
        "readers": READERS,
        "disk": on_disk(hessian, options.repeats),
        "clouds": on_clouds(hessian, options.repeats, options.clouds),
    }
    (HERE / "results" / "stores.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
