"""Every format keeps the same contract; a chunk and its mirror image go to each."""

import finished
import numpy as np
import pytest

from pipeline import IncompleteError
from pipeline.spec import FormatName
from pipeline.storage.chunk_formats import FORMATS, formats_of, store_chunk
from pipeline.storage.output import MATRIX, PARQUET, Output
from pipeline.storage.zarr_store import MatrixStore

B = 16
FULL = np.random.default_rng(0).standard_normal((40, 40))
FOLDERS = {"zarr": MATRIX, "parquet": PARQUET}


def manifest(symmetry="mirrored", codec="lz4"):
    made = finished.manifest({"w": (40,)}, B, symmetry=symmetry, codec=codec)
    return made.model_copy(update={"formats": ("zarr", "parquet")})


def opened(made):
    output = Output.private()
    MatrixStore.create(output, made, np.zeros(40))
    return output, formats_of(output, made)


def chunk(i, j):
    return np.ascontiguousarray(FULL[i * B : (i + 1) * B, j * B : (j + 1) * B])


def test_all_names_of_the_settings_have_a_format():
    assert tuple(FORMATS) == FormatName.__args__


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("place", [(0, 1), (1, 2), (2, 2)])
def test_reads_what_it_wrote(name, codec, place):
    output, formats = opened(manifest(codec=codec))
    put = formats[name].write_chunk(*place, chunk(*place))
    assert put.key == formats[name].key(*place)
    assert output.sizes(FOLDERS[name])[put.key] == put.bytes
    np.testing.assert_array_equal(formats[name].read_chunk(*place, put), chunk(*place))


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_as_its_receipt_says(name):
    output, formats = opened(manifest())
    put, other = (formats[name].write_chunk(*place, chunk(*place)) for place in [(0, 1), (0, 0)])
    where = f"{FOLDERS[name]}/{put.key}"
    whole = output.get(where)
    output.put(where, output.get(f"{FOLDERS[name]}/{other.key}"))
    with pytest.raises(IncompleteError, match=r"checksum|bytes"):
        formats[name].read_chunk(0, 1, put)
    output.put(where, whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
    with pytest.raises(IncompleteError, match="checksum"):
        formats[name].read_chunk(0, 1, put)
    output.delete(where)
    with pytest.raises(IncompleteError, match="missing"):
        formats[name].read_chunk(0, 1, put)


@pytest.mark.parametrize(("symmetry", "images"), [("mirrored", [(0, 1), (1, 0)]), ("upper", [(0, 1)])])
def test_a_chunk_and_its_image_go_to_all_formats(symmetry, images):
    made = manifest(symmetry)
    _, formats = opened(made)
    put = {stored.key: stored for stored in store_chunk(formats.values(), made, 0, 1, chunk(0, 1))}
    assert put.keys() == {each.key(*place) for each in formats.values() for place in images}
    for each in formats.values():
        for place in images:
            expected = chunk(0, 1) if place == (0, 1) else chunk(0, 1).T
            np.testing.assert_array_equal(each.read_chunk(*place, put[each.key(*place)]), expected)


def test_the_image_is_the_callers_where_there_is_one():
    made = manifest()
    _, formats = opened(made)
    mirror = chunk(1, 2).T.copy()
    _, _, *images = store_chunk(formats.values(), made, 1, 2, chunk(1, 2), mirror)
    again = [each.write_chunk(2, 1, mirror) for each in formats.values()]
    assert images == again
    assert len(store_chunk(formats.values(), made, 1, 1, chunk(1, 1))) == 2  # on the diagonal it is its own
