"""What strangers may have done to the objects of an output: by kind and name, a function of its folder."""

import json
import os
import struct
from pathlib import Path

import crc32c
import numpy as np

DEEP = "[" * 100_000
HUGE = 10**12
CHUNK, RECEIPT = "hessian.zarr/c/0/1", "receipts/r0-1_c1-2.json"
MATRIX, GRADIENT = "hessian.zarr/zarr.json", "gradient.zarr/zarr.json"
NOT_JSON = {
    "nothing": b"",
    "zeros": bytes(4096),
    "cut": b'{"format": 3, "param',
    "deep": DEEP.encode(),
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "no text": b"\xff\xfe\xfa",
    "5,000 digits": b'{"format": ' + b"9" * 5000 + b"}",
    "half a pair": b'"\\ud800"',
    "not a number": b"NaN",
}


def written(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def changed(name, **changes):
    """Keys replaced by their paths: `a__b__0` is a, then b, then the first."""

    def change(folder):
        path = folder / name
        whole = json.loads(path.read_text())
        for place, value in changes.items():
            *parents, last = [int(part) if part.isdigit() else part for part in place.split("__")]
            inside = whole
            for parent in parents:
                inside = inside[parent]
            if value is None.__class__:
                del inside[last]
            else:
                inside[last] = value
        path.write_text(json.dumps(whole))

    return change


def replaced(name, how):
    """A place that is no file: `how` makes it."""

    def replace(folder):
        path = folder / name
        path.unlink()
        how(path)

    return replace


ELSE = {
    "a pipe": os.mkfifo,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a folder": Path.mkdir,
    "huge and sparse": lambda path: _sparse(path, 3 * 10**8),
    "as large as the disk": lambda path: _sparse(path, 10**12),
}


def _sparse(path, size):
    with path.open("wb") as file:
        file.truncate(size)


def with_checksum(data):
    return data + crc32c.crc32c(data).to_bytes(4, "little")


def says_more(folder):
    """A chunk whose header says that it is 5 GB before compression."""
    path = folder / CHUNK
    data = path.read_bytes()[:-4]
    path.write_bytes(with_checksum(data[:4] + struct.pack("<I", 2**32 - 6) + data[8:]))


def says_more_stored(folder):
    path = folder / CHUNK
    data = path.read_bytes()[:-4]
    path.write_bytes(with_checksum(data[:12] + struct.pack("<I", 2**31) + data[16:]))


def _renamed_lease(name):
    def rename(folder):
        (lease,) = (folder / "lease").iterdir()
        lease.rename(lease.with_name(name))

    return rename


def _all_of(name):
    return {f"{name}: {kind}": written(name, data) for kind, data in NOT_JSON.items()} | {
        f"{name}: {kind}": replaced(name, how) for kind, how in ELSE.items()
    }


def _manifest():
    shapes = {
        "negative": [-3],
        "huge": [HUGE],
        "huge in product": [HUGE] * 400,
        "a text": "3",
        "a number": 3,
        "fractions": [2.0, 2.0],
        "deep": [[[2]]],
        "null": None,
        "truths": [True, True],
    }
    made = {f"shape {kind}": changed("manifest.json", parameters__0__shape=shape) for kind, shape in shapes.items()}
    for key, values in {
        "chunk": [0, -1, 1, HUGE, 10**400, 1.5, "4", None],
        "tile_shape": [[0, 1], [-1, 1], [1], [1, 1, 1], [HUGE, HUGE], "all", None],
        "parameters": [[{}], [], [[]], {}, None, [None], "all"],
        "parameters__0__name": [1, None, [], "nowhere", "2.bias"],
        "parameters__1__offset": [0, -1, HUGE, "4"],
        "parameters__1__size": [0, HUGE, 1e300],
        "blocks": [[], "none", [["a", "b"]], [["0.weight"]], [[1, 2]], {}, [[["0.weight", "0.weight"]]], None],
        "sizes": [{}, {"rows": {}}, {"factored": {"microbatch": 0, "row_group": 1}}, [], None],
        "preflight": [{}, [], None],
        "preflight__parameters": [{}, {"0.weight": {}}, []],
        "fingerprint__loss": ["1", None, [], float("nan"), 10**400],
        "fingerprint__weights": ["", 1, "g" * 64, None],
        "fingerprint__samples": [1.5, "4", None],
        "dtype": ["int8", 1, None, ["float64"]],
        "store_dtype": ["float16", "object", {}],
        "codec": ["gzip", 1],
        "symmetry": ["none", True],
        "formats": [["csv"], "zarr", {}],
        "format": [2, 4, "3", None],
        "versions": [1, {"torch": 1}, None],
        "problem": [1, []],
    }.items():
        made |= {f"{key} {str(value)[:40]}": changed("manifest.json", **{key: value}) for value in values}
    made["1e5 rows in chunks of one"] = changed(
        "manifest.json",
        chunk=1,
        parameters=[{"name": "a", "shape": [10**5], "offset": 0, "size": 10**5}],
    )
    return {f"manifest: {kind}": change for kind, change in made.items()} | {
        "manifest: one key more": changed("manifest.json", more=1),
        "manifest: repeated": lambda folder: (folder / "manifest.json").write_text(
            '{"a": 1,' + (folder / "manifest.json").read_text()[1:]
        ),
    }


def _metadata():
    made = {}
    for name in (MATRIX, GRADIENT):
        for key, values in {
            "shape": [[9], [HUGE, HUGE], [-1, 9], "9", [], None, [8, 9]],
            "chunk_grid__configuration__chunk_shape": [[0, 0], [HUGE], [3, 3], None, "all"],
            "chunk_grid": [{}, [], {"name": "rectilinear"}],
            "data_type": ["float16", "float32", {}, None],
            "codecs": [[], [{}], [1], "bytes", [{"name": "bytes", "configuration": {"endian": "big"}}]],
            "chunk_key_encoding": [{}, {"name": "v2"}, None],
            "node_type": ["group", None],
            "zarr_format": [2, "3"],
            "fill_value": [0, None, []],
        }.items():
            made |= {f"{name}: {key} {str(value)[:40]}": changed(name, **{key: value}) for value in values}
    return made


def _chunks():
    gradient = "gradient.zarr/c/0"
    return {
        "chunk: says 5 GB": says_more,
        "chunk: says that more is stored": says_more_stored,
        "chunk: zeros": written(CHUNK, bytes(144)),
        "chunk: nothing": written(CHUNK, b""),
        "chunk: a byte": written(CHUNK, b"\1"),
        "chunk: a checksum alone": written(CHUNK, with_checksum(b"")),
        "chunk: a header alone": written(CHUNK, with_checksum(bytes(12) + struct.pack("<I", 16))),
        "chunk: gone": lambda folder: (folder / CHUNK).unlink(),
        **{f"chunk: {kind}": replaced(CHUNK, how) for kind, how in ELSE.items()},
        "gradient: ten entries": written(gradient, with_checksum(np.zeros(10).tobytes())),
        "gradient: of numbers that are none": written(gradient, with_checksum(np.full(9, np.nan).tobytes())),
        "gradient: gone": lambda folder: (folder / gradient).unlink(),
        **{f"gradient: {kind}": replaced(gradient, how) for kind, how in ELSE.items()},
    }


def _receipts():
    made = _all_of(RECEIPT)
    for key, values in {
        "chunks": [[], {}, [{}], [{"key": "c/0/1", "bytes": -1, "crc32c": 0}], [{"key": 1, "bytes": 1, "crc32c": 1}]],
        "norm": [-1, "1", None, float("inf"), 10**400],
        "finished": [-1, 1e300, "now", float("nan")],
        "products": ["", "%", "AAAA", 1, None, "A" * 10**7],
        "run": ["", "other", 1],
        "tile": ["r0-1_c0-1", 1],
        "attempt": [-1, 10**30, None],
        "host": [1, None, "\x1b[31m"],
    }.items():
        made |= {f"receipt: {key} {str(value)[:40]}": changed(RECEIPT, **{key: value}) for value in values}
    return made


def _words():
    made = _all_of("verify.json") | {f"_SUCCESS: {kind}": replaced("_SUCCESS", how) for kind, how in ELSE.items()}
    for value in [1, 0, "true", None, [], {}]:
        made[f"verify.json: ok {value!r}"] = changed("verify.json", ok=value)
    lease = "lease/00000001.json"
    made |= _all_of(lease)
    for key, values in {
        "since": [-1, 1e300, "now", None, [], float("inf")],
        "host": [1, None, "[/bold]", "\x1b[2J"],
        "pid": [-1, 10**30, "1", None],
        "born": [-1, 1e300, {}],
        "machine": [1, []],
        "released": [1, "yes", None],
        "state": [
            [],
            1,
            {"done": -1},
            {"done": 3, "seconds": 0},
            {"lost": []},
            {"lost": {"a": "b"}},
            {"errors": "[/a]"},
        ],
        "state__set_aside": [[], 3, {"a": 1}],
        "state__errors": [["[/bold]"], [1], ["\x1b]0;title\x07"], "text"],
        "token": [1, None],
    }.items():
        made |= {f"lease: {key} {str(value)[:40]}": changed(lease, **{key: value}) for value in values}
    for name in ("9" * 30 + ".json", "²0000001.json", "x.json", "00000001.json.partial"):
        made[f"lease: by the name of {name}"] = _renamed_lease(name)
    return made


CORPUS = {
    "manifest": _all_of("manifest.json") | _manifest(),
    "metadata": _all_of(MATRIX) | _all_of(GRADIENT) | _metadata(),
    "chunks": _chunks(),
    "receipts": _receipts(),
    "words": _words(),
}
