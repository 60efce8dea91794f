"""The GPU benchmark runs on torch and NumPy alone, and says so where something is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.full("runs benchmarks at small sizes")

BENCHMARKS = Path(__file__).parent
ABSENT = ["ray", "zarr", "fsspec", "sklearn", "pydantic", "psutil", "pyarrow", "yaml", "click", "rich", "safetensors"]
RUN = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT}))  # what is None there cannot be imported
sys.path.insert(0, {str(BENCHMARKS)!r})
sys.argv[0] = {str(BENCHMARKS / "gpu.py")!r}
"""
# Wrong by a thousandth in its last column, and only where more rows are asked for than preflight looks at.
SPOILT = """
import bare
from pipeline.engines.registry import ENGINES
class Spoilt(ENGINES["factored"]):
    def add(self, batch, rows, cols, out):
        super().add(batch, rows, cols, out)
        out[:, -1] *= 1.001 if len(rows) > 32 else 1
ENGINES["factored"] = Spoilt
"""
START = "runpy.run_path(sys.argv[0], run_name='__main__')"


def run(code, results, *options):
    """Give the exit status and what was written."""
    command = [sys.executable, "-c", code, "--small", "--results", str(results), *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=results.parent)
    assert results.exists(), done.stderr
    return done.returncode, json.loads(results.read_text())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_all_parts(device, tmp_path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    status, found = run(RUN + START, tmp_path / "gpu.json", "--device", device)
    assert [found[part]["faults"] for part in ("engines", "peers", "headline", "zoo")] == [[], [], [], []]
    assert status == 0
    assert len(found["engines"]["cases"]) == 3 * 4 * 2
    assert all("seconds" in row[peer] for row in found["peers"]["problems"] for peer in ("ours", "torch.func.hessian"))
    kinds = {case["type"] for case in found["headline"]["cases"]}
    assert kinds == {"float32", "float64", "tf32x3"}
    assert found["zoo"]["counts"]["right"] > found["zoo"]["counts"]["refused"] > 0
    assert not found["zoo"]["wrong"] and not found["zoo"]["skipped"]  # noqa: PT018


@pytest.mark.long
def test_on_a_pretended_device(tmp_path):
    support = BENCHMARKS.parent / "support"
    pretended = f"""
sys.path.insert(0, {str(support)!r})
from pretended_cuda import pretended_cuda
with pretended_cuda():
    {START}
"""
    status, found = run(RUN + pretended, tmp_path / "gpu.json", "--device", "cuda", "--only", "engines", "peers")
    assert [found[part]["faults"] for part in ("engines", "peers")] == [[], []]
    assert status == 0


@pytest.mark.long
def test_a_wrong_engine_is_told(tmp_path):
    parts = "engines", "peers", "headline"
    status, found = run(RUN + SPOILT + START, tmp_path / "gpu.json", "--device", "cpu", "--only", *parts)
    assert status == 1
    assert all(found[part]["faults"] for part in parts)
