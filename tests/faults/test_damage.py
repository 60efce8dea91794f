"""Damage to what is stored already: found, said, and mended, at the price of the tiles concerned."""

import json

import numpy as np
import pytest
import zoo
from proxy import refuse
from runs import finish_times, undisturbed

from pipeline import IncompleteError, VerificationError, compute_hessian
from pipeline.errors import OutputError, StoppedError
from pipeline.progress import Reporter
from pipeline.results.receipt_audit import SHOWN
from pipeline.runs.api import run
from pipeline.runs.status import status
from pipeline.storage.output import Output

pytestmark = pytest.mark.full("damages every kind of object, and mends it")


class Said(Reporter):
    """Keeps what it is told."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def flipped(data):
    """One bit, in the middle."""
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]


DAMAGE = {
    "missing": lambda data: None,
    "zero bytes": lambda data: b"",
    "truncated": lambda data: data[:-5],
    "longer": lambda data: data + b"12345",
    "flipped bit": flipped,
    "flipped bit in the checksum": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
}
OBJECTS = {
    "zarr": ("zarr", "hessian.zarr/c/0/1"),
    "mirror": ("zarr", "hessian.zarr/c/1/0"),
    "ragged": ("zarr", "hessian.zarr/c/3/3"),
    "upper": ("upper", "hessian.zarr/c/0/1"),
    "one chunk": ("one chunk", "hessian.zarr/c/0/0"),
    "parquet": ("parquet", "hessian.parquet/row_chunk=1/col_chunk=0/chunk.parquet"),
}


def damage(output, name, how):
    """Do something to an object, and say whether its size tells."""
    whole = output.get(name)
    broken = DAMAGE[how](whole)
    assert broken != whole
    if broken is None:
        output.delete(name)
    else:
        output.put(name, broken)
    return broken is None or len(broken) != len(whole)


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("where", OBJECTS)
def test_a_damaged_object(proxy, url, faults, where, how):
    """In a finished output. What a listing shows is mended without reading; `check` finds everything."""
    shape, name = OBJECTS[where]
    known, said = undisturbed(shape), Said()
    output = known.finished(url)
    before = finish_times(output)
    shown = damage(output, name, how)
    if shown:
        mended = known.run(url)
        assert mended.computed == 1
        damage(output, name, how)
    else:
        assert known.run(url).computed == 0
    outcome = known.run(url, check=True, report=said)
    assert outcome.computed == 1
    assert any(name.removeprefix("hessian.zarr/") in line for line in said.lines)
    assert sum(finished > before[tile] for tile, finished in finish_times(output).items()) == 1
    fault = f"{'Parquet file' if where == 'parquet' else 'chunk'}: {how}"
    faults(fault, f"S3, {where}", times=1 + shown, recomputed=1, tiles=known.tiles, equal=known.equals(outcome))


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_in_an_unfinished_output(tmp_path, faults, how):
    known = undisturbed("zarr")
    output = known.finished(str(tmp_path))
    for name in ("_SUCCESS", "verify.json", "receipts/r2-3_c3-4.json"):
        output.delete(name)
    damage(output, "hessian.zarr/c/0/2", how)
    outcome = known.run(output.url, check=True)
    assert outcome.computed == 2
    faults(f"chunk: {how}", "disk, unfinished", times=1, recomputed=1, tiles=known.tiles, equal=known.equals(outcome))


def other_types(receipt):
    values = json.loads(receipt)
    values["chunks"][0]["key"] = ["a", "list"]
    return json.dumps(values).encode()


def of_another_run(receipt):
    return json.dumps({**json.loads(receipt), "run": "0123456789abcdef"}).encode()


RECEIPTS = {
    "missing": lambda own, other: None,
    "zero bytes": lambda own, other: b"",
    "truncated": lambda own, other: own[:-20],
    "not JSON": lambda own, other: b"\x89PNG\r\n\x1a\n\xff\xfe",
    "other JSON": lambda own, other: b"[1, 2, 3]",
    "other types": lambda own, other: other_types(own),
    "missing key": lambda own, other: json.dumps({"tile": "r0-1_c1-2"}).encode(),
    "of another tile": lambda own, other: other,
    "of another run": lambda own, other: of_another_run(own),
}


@pytest.mark.parametrize("how", RECEIPTS)
def test_a_damaged_receipt(proxy, url, faults, how):
    """Its tile is computed again, whatever lies there."""
    known = undisturbed("parquet")
    output = known.finished(url)
    own, other = (output.get(f"receipts/{tile}.json") for tile in ("r0-1_c1-2", "r0-1_c2-3"))
    broken = RECEIPTS[how](own, other)
    if broken is None:
        output.delete("receipts/r0-1_c1-2.json")
    else:
        output.put("receipts/r0-1_c1-2.json", broken)
    outcome = known.run(url)
    assert outcome.computed == 1
    faults(f"receipt: {how}", "S3", times=1, recomputed=1, tiles=known.tiles, equal=known.equals(outcome))


def test_another_run_in_the_same_place(tmp_path, faults):
    """Receipts and chunks of the same tiles, each right by itself, but of other weights."""
    known, other = undisturbed("zarr"), tmp_path / "other"
    problem = zoo.ridge().problem
    compute_hessian(problem, str(other), **known.settings.model_dump(exclude_defaults=True))
    output = known.finished(str(tmp_path / "out"))
    strange = Output(str(other))
    for name in ("hessian.zarr/c/1/1", "hessian.zarr/c/0/0", "receipts/r0-1_c0-1.json", "receipts/r1-2_c1-2.json"):
        assert output.get(name) is not None
        output.put(name, strange.get(name))
    outcome = known.run(output.url)
    assert outcome.computed == 2
    faults("chunks of another run", "disk", times=2, recomputed=2, tiles=known.tiles, equal=known.equals(outcome))


def test_a_finding_outlives_the_run_that_made_it(proxy, url, faults):
    """What `check` found is mended by the next run without it, where that one was stopped."""
    known = undisturbed("zarr")
    output = known.finished(url)
    damage(output, "hessian.zarr/c/1/2", "flipped bit")
    proxy.rule(refuse(403, "AccessDenied"), method="PUT", path="/hessian.zarr/c/")
    with pytest.raises(StoppedError):
        known.run(url, check=True)
    proxy.clear()
    outcome = known.run(url)
    assert outcome.computed == 1
    faults("chunk: flipped bit", "S3, stopped", times=1, recomputed=1, tiles=known.tiles, equal=known.equals(outcome))


def test_the_proof_names_the_remedy(tmp_path):
    """A flipped bit in an unfinished output, which a run without `check` finds at its end."""
    known = undisturbed("zarr")
    output = known.finished(str(tmp_path))
    output.delete("_SUCCESS")
    damage(output, "hessian.zarr/c/1/2", "flipped bit")
    with pytest.raises(
        VerificationError, match="run the job with --check, which computes again what is not as its receipt says"
    ):
        known.run(output.url)
    assert known.run(output.url, check=True).computed == 1


@pytest.mark.parametrize("name", ["hessian.zarr/zarr.json", "gradient.zarr/zarr.json", "gradient.zarr/c/0"])
@pytest.mark.parametrize("damaged", [None, b"", b"{", b"{}"])
def test_a_damaged_set_up_is_refused(tmp_path, name, damaged):
    """There is nothing to compute it from again: in one line, by name."""
    known = undisturbed("zarr")
    output = known.finished(str(tmp_path))
    output.delete(name) if damaged is None else output.put(name, damaged)
    with pytest.raises(OutputError, match=name.split("/")[0]) as refused:
        known.run(output.url, check=True)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("proof", [b"", b'{"ok": tr', b"[]"])
def test_a_damaged_proof_is_made_again(tmp_path, proof):
    known = undisturbed("zarr")
    output = known.finished(str(tmp_path))
    output.put("verify.json", proof)
    assert known.run(output.url).verification.ok


def test_a_proof_is_of_what_was_there_then(tmp_path):
    """Tiles that are computed again without one are proven when one is asked for again."""
    known = undisturbed("zarr")
    output = known.finished(str(tmp_path))
    assert status(output.url)["verified"]
    damage(output, "hessian.zarr/c/1/2", "flipped bit")
    run(zoo.mlp().problem, known.settings.model_copy(update={"verify": False}), output.url, check=True)
    assert status(output.url)["verified"] is None
    assert known.run(output.url).verification.ok
    output.put("verify.json", b"")
    assert status(output.url)["verified"] is False


def test_check_as_an_argument(tmp_path):
    known = undisturbed("zarr")
    output = known.finished(str(tmp_path))
    damage(output, "hessian.zarr/c/1/2", "flipped bit")
    options = known.settings.model_dump(exclude_defaults=True)
    with pytest.raises(IncompleteError):
        compute_hessian(zoo.mlp().problem, output.url, **options).store.read_chunk(1, 2)
    np.testing.assert_array_equal(
        compute_hessian(zoo.mlp().problem, output.url, **options, check=True).to_numpy(), known.matrix
    )


def test_the_commands(hessian, tmp_path):
    """`verify --chunks` on an output in the making, whole and damaged; then `run --check`."""
    known = undisturbed("parquet")
    output = known.finished(str(tmp_path / "out"))
    output.delete("_SUCCESS")
    for tile in ("r2-3_c2-3", "r3-4_c3-4"):
        output.delete(f"receipts/{tile}.json")
    whole = hessian("verify", "out", "--chunks")
    assert (whole.returncode, whole.stdout) == (0, "28 objects of 8 tiles are what their receipts say\n")
    damage(output, "hessian.zarr/c/0/1", "flipped bit")
    damage(output, "hessian.parquet/row_chunk=1/col_chunk=3/chunk.parquet", "missing")
    output.put("receipts/r0-1_c0-1.json", b"{")
    damaged = hessian("verify", "out", "--chunks")
    assert damaged.returncode == 1
    tiles = [line.split(": ")[0] for line in damaged.stdout.splitlines()]
    assert tiles == ["tile r0-1_c0-1", "tile r0-1_c1-2", "tile r1-2_c3-4"]
    assert "3 faults in 26 objects of 8 tiles; run the job with --check" in damaged.stderr
    mended = hessian("run", "job.yaml", "--output", "out", "--check", "--set", "formats=[zarr, parquet]")
    assert mended.returncode == 0, mended.stderr
    assert "5 computed now, 10 in all" in mended.stdout
    assert known.run(output.url, check=True).computed == 0
    assert "are what their receipts say" in hessian("verify", "out", "--chunks").stdout


def test_of_very_many_faults_some_are_shown(hessian, tmp_path):
    known = undisturbed("parquet")
    output = known.finished(str(tmp_path / "out"))
    for name in known.objects:
        if name.startswith(("hessian.zarr/c/", "hessian.parquet/")):
            output.delete(name)
    lines = hessian("verify", "out", "--chunks").stdout.splitlines()
    assert len(lines) == SHOWN + 1
    assert lines[-1] == f"and {32 - SHOWN} more"


def test_nothing_to_read_back(hessian):
    assert "holds no Hessian" in hessian("verify", "out", "--chunks").stderr
    assert hessian("verify", "out", "--chunks", "--job", "job.yaml").returncode == 2
