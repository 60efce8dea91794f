"""What an array says of itself: that of its manifest, or it is refused."""

import json

import numpy as np
import pytest
import zarr

from pipeline import OutputError
from pipeline.storage.array_metadata import require_array
from pipeline.storage.chunk_codec import zarr_codecs
from pipeline.storage.output import Output

EXPECTED = {"shape": (5, 5), "chunks": (2, 2), "dtype": "float32", "codecs": zarr_codecs("lz4")}


@pytest.fixture
def out(tmp_path):
    zarr.create_array(
        str(tmp_path / "x.zarr"),
        shape=(5, 5),
        chunks=(2, 2),
        dtype="float32",
        compressors=zarr_codecs("lz4"),
        fill_value=float("nan"),
    )
    return tmp_path


def require(out, **changes):
    require_array(Output(str(out)), "x.zarr", **(EXPECTED | changes))


def test_as_it_was_written(out):
    require(out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (5, 6)}, r"shape \(5, 5\), expected \(5, 6\)"),
        ({"chunks": (2, 3)}, r"chunks \(2, 2\), expected"),
        ({"dtype": "float64"}, "type float32, expected float64"),
        ({"codecs": zarr_codecs("none")}, "codecs"),
    ],
)
def test_of_another_manifest(out, changes, message):
    with pytest.raises(OutputError, match=f"are not those of its manifest: {message}"):
        require(out, **changes)


def test_missing(tmp_path):
    with pytest.raises(OutputError, match=r"has no x\.zarr"):
        require(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"fill_value": 0.0},  # what is missing would be zeros
        {"node_type": "group"},
        {"zarr_format": 2},
        {"shape": "5, 5"},
        {"chunk_key_encoding": {"name": "v2", "configuration": {"separator": "/"}}},
        {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}}},
        {"codecs": None},
    ],
)
def test_damaged(out, change):
    path = out / "x.zarr" / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(OutputError, match=r"metadata of x\.zarr are damaged"):
        require(out)


def test_entries_of_the_other_byte_order(out):
    path = out / "x.zarr" / "zarr.json"
    said = json.loads(path.read_text())
    said["codecs"][0]["configuration"]["endian"] = "big"
    path.write_text(json.dumps(said))
    with pytest.raises(OutputError, match=r"codecs .*bytes big"):
        require(out)


def test_a_reader_that_knows_zarr_alone_reads_it(out):
    assert np.isnan(zarr.open_array(str(out / "x.zarr"))[0, 0])
