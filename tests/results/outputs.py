"""Runs that leave Parquet files, and what lies in a folder."""

from pathlib import Path

import zoo

from pipeline import compute_hessian

CHUNK = 16  # of 59 rows: the last chunk is ragged
BOTH = ("zarr", "parquet")


def compute(path, make=zoo.mlp, **options):
    settings = {"executor": "serial", "chunk": CHUNK, "tile": (1, 2), "formats": BOTH, "verify": False, **options}
    return compute_hessian(make().problem, str(path), **settings)


def contents(folder):
    folder = Path(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
