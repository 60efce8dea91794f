"""Job specs: what is accepted, and how faults are said."""

from pathlib import Path

import pytest
import torch

from pipeline import SpecError
from pipeline.spec import JobSpec, Settings, load_job, parse

JOBS = Path(__file__).parents[1] / "jobs"


def write(tmp_path, text):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


def test_every_field_is_documented():
    for name, field in JobSpec.model_fields.items():
        assert field.description, name
        assert "\n" not in field.description


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda p: p.stem)
def test_jobs_are_valid(path):
    assert load_job(path).output


@pytest.mark.parametrize("given", [torch.float64, "float64", "torch.float64"])
def test_dtype_by_name_or_as_torch_has_it(given):
    assert parse(Settings, {"dtype": given}, "test").dtype == "float64"


def test_overrides(tmp_path):
    path = write(tmp_path, "problem: a.py:f\nproblem_args: {width: 3}\n")
    given = ["chunk=32", "memory=2GiB", "problem_args.width=5", "blocks=[[a, b]]", "formats=[parquet, zarr]"]
    job = load_job(path, given, "memory://x")
    assert (job.chunk, job.memory, job.problem_args, job.output) == (32, 2**31, {"width": 5}, "memory://x")
    assert job.blocks == (("a", "b"),)
    assert job.formats == ("zarr", "parquet")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("problem: a.py:f\nengin: rows", "unknown key `engin`; did you mean `engine`"),
        ("engine: rows", "missing key `problem`"),
        ("problem: a.py:f\nengine: fast", "`engine` got 'fast'.*How tiles are computed"),
        ("problem: a.py:f\nchunk: 0", "`chunk` got 0.*greater than 0"),
        ("problem: a.py:f\nchunk: '64'", "`chunk` got '64'.*valid integer"),
        ("problem: a.py:f\nworkers: true", "`workers` got True"),
        ("problem: a.py:f\nverify: 'no'", "`verify` got 'no'"),
        ("problem: a.py:f\ndtype: bfloat16", "`dtype` got 'bfloat16'"),
        ("problem: a.py:f\nblocks: half", "`blocks` got 'half'"),
        ("problem: a.py:f\nblocks: diag", "`blocks` got 'diag': [^;]*; did you mean `diagonal`"),
        ("problem: a.py:f\nparams: 3", "`params` got 3"),
        ("problem: a.py:f\nformats: [parquet]", r"`formats` got \['parquet'\]: zarr is always needed"),
        ("problem: a.py:f\nformats: []", r"`formats` got \[\]: zarr is always needed"),
        ("problem: a.py:f\nformats: [zarr, zarr]", "`formats` got .*: expected each format once"),
        ("problem: a.py:f\nformats: [zarr, csv]", "`formats` got 'csv': Input should be 'zarr' or 'parquet'"),
        ("problem: a.py:f\nformats: parquet", "`formats` got 'parquet'.*valid tuple"),
        ("problem: a.py:f\ngpus_per_worker: 2", "`gpus_per_worker` got 2: .*less than or equal to 1"),
        ("problem: a.py:f\nresources: {GPU: 1}", "`resources` got .*: GPU is asked for by gpus_per_worker"),
        ("problem: a.py:f\nresources: {own: 0}", "`resources` got .*: expected amounts above 0"),
        ("problem: a.py:f\nlabel_selector: {a b: c}", "`label_selector` got .*: 'a b' is no name of a label"),
        ("problem: a.py:f\nlabel_selector: {a: in(b}", r"`label_selector` got .*: expected `a`, `!a`, `in\(a, b\)`"),
        ("- a", "got a list, expected a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_faults_are_one_clear_line(tmp_path, text, message):
    with pytest.raises(SpecError, match=message) as caught:
        load_job(write(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["chunk", "=3", "problem.x=1", "chunk=[", "problem_args.a.b.c=}"])
def test_bad_overrides(tmp_path, override):
    with pytest.raises(SpecError, match="--set"):
        load_job(write(tmp_path, "problem: a.py:f"), [override])
