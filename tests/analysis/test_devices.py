"""Products and eigenvalues on a device of torch, beside NumPy's and SciPy's; and which of the two is chosen."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from finished import P, pair

from pipeline.analysis import devices, products

RIGHT = np.random.default_rng(3).standard_normal((P, 3))


@pytest.fixture
def cpu_for_cuda(monkeypatch):
    """Have torch's CPU stand for a GPU with so much memory: what is sent to which device is noted."""
    sent = []

    def give(free):
        monkeypatch.setattr(devices, "_free_bytes", lambda: free)
        for module in (products, sys.modules["pipeline.analysis.spectrum"]):
            monkeypatch.setattr(module, "placed", lambda v, kind, on: sent.append(on) or devices.placed(v, kind, "cpu"))
        return sent

    return give


def test_products(case):
    H, full = case
    v = RIGHT[: len(full)]
    for operand in (v, v[:, 0], v.astype(np.float32), np.arange(len(full)), 1j * v):
        found = H.multiply(operand, device="cpu")
        assert found.dtype == (H @ operand).dtype
        np.testing.assert_allclose(found, H @ operand, rtol=0, atol=1e-12 if found.dtype != np.float32 else 1e-4)
    held = H.multiplier("cpu")(v)
    np.testing.assert_allclose(held, full @ v, atol=1e-12)


def test_uncompressed_chunks_are_not_written_into():
    H, full = pair(codec="none")
    np.testing.assert_allclose(H.multiply(RIGHT, device="cpu"), full @ RIGHT, atol=1e-12)
    np.testing.assert_array_equal(H.to_numpy(), full)


def test_eigenvalues(case):
    H, full = case
    known = np.linalg.eigvalsh(full)
    np.testing.assert_allclose(H.eigvalsh(device="cpu"), known, atol=1e-12)
    np.testing.assert_array_equal(H.eigvalsh(), H.eigvalsh(device="cpu"))  # kept
    w, U = H.eigh(device="cpu")
    np.testing.assert_allclose(w, known, atol=1e-12)
    np.testing.assert_allclose((U * w) @ U.T, full, atol=1e-12)
    np.testing.assert_allclose(H.eigh()[0], w, atol=1e-12)


def test_a_gpu_is_taken_where_there_is_room(cpu_for_cuda):
    sent = cpu_for_cuda(2**30)
    H, full = pair()
    np.testing.assert_allclose(H @ RIGHT, full @ RIGHT, atol=1e-12)
    assert set(sent) == {"cuda"}
    assert len(sent) == 1 + 10  # the operand, and each chunk of the upper triangle once
    for ask in (H.eigvalsh, H.eigh, H.multiplier):
        sent.clear()
        ask()
        assert sent == ["cuda"]


def test_a_gpu_too_small_is_not(cpu_for_cuda):
    sent = cpu_for_cuda(0)
    H, full = pair()
    np.testing.assert_allclose(H.multiplier()(H @ RIGHT), full @ full @ RIGHT, atol=1e-12)
    H.eigvalsh(), H.eigh()
    assert sent == []
    cpu_for_cuda(8 * P * P * 5 // 2)  # two matrices fit, three are needed
    H.eigh()
    assert sent == []


def test_torch_is_not_imported_to_find_no_gpu():
    code = (
        "from pipeline.analysis import devices; import sys; assert devices.chosen(None, 1) is None; print(*sys.modules)"
    )
    if devices.DRIVER.exists():
        pytest.skip("there is a GPU's driver")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" not in found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(case):
    H, full = case
    v = RIGHT[: len(full)]
    np.testing.assert_allclose(H.multiply(v, device="cuda"), full @ v, atol=1e-12)
    np.testing.assert_allclose(H.eigvalsh(device="cuda"), np.linalg.eigvalsh(full), atol=1e-12)
    w, U = H.eigh(device="cuda")
    np.testing.assert_allclose((U * w) @ U.T, full, atol=1e-12)
    np.testing.assert_allclose(H.multiplier("cuda")(v), full @ v, atol=1e-12)
