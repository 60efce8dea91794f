"""Strips, panels and mirrored halves of products add up to the sums they stand for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engines import products
from pipeline.engines.products import Workspace, add_product, add_symmetric, split, tangents

sizes = st.integers(1, 12)


@pytest.fixture(autouse=True)
def _small_strips(monkeypatch):
    """Several strips and panels even of small sums."""
    monkeypatch.setitem(products.STRIP_BYTES, "cpu", 1200)
    monkeypatch.setitem(products.OPERAND_BYTES, "cpu", 900)
    monkeypatch.setattr(products, "FEWEST_SAMPLES", 3)
    monkeypatch.setattr(products, "SYMMETRIC_STRIP", 5)


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def matrix(units, inputs, cols, others, *, mirrored):
    """A matrix of ones with its view by units and inputs; mirrored, as a transpose."""
    flat = torch.ones(units * inputs, cols * others, dtype=torch.float64)
    flat = flat.T.contiguous().T if mirrored else flat
    return flat.unflatten(0, (units, inputs)).unflatten(2, (cols, others))


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, sizes, sizes, sizes, st.booleans())
def test_product(units, inputs, cols, others, samples, mirrored):
    a, b, X = random(samples, inputs), random(samples, others), random(units, samples, cols)
    out = matrix(units, inputs, cols, others, mirrored=mirrored)
    add_product(out, a, b, X, Workspace())
    np.testing.assert_allclose(out, 1 + torch.einsum("nj,nk,inp->ijpk", a, b, X), atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4), st.integers(1, 5), st.integers(0, 4), st.integers(1, 5), sizes, sizes, st.integers(1, 5))
def test_symmetric(first, rows, left, cols, inputs, samples, group):
    """Any rows against any columns, a group of units after the other."""
    rows, cols = range(first, first + rows), range(left, left + cols)
    a, S = random(samples, inputs), random(samples, 10, 10)
    S = S + S.transpose(1, 2)
    out, space = matrix(len(rows), inputs, len(cols), inputs, mirrored=False), Workspace()  # one for calls of all sizes
    for start in range(rows.start, rows.stop, group):
        units = range(start, min(start + group, rows.stop))
        X = S[:, units.start : units.stop, cols.start : cols.stop].transpose(0, 1)
        add_symmetric(out, a, X, units, rows, cols, space)
    X = S[:, rows.start : rows.stop, cols.start : cols.stop]
    np.testing.assert_allclose(out, 1 + torch.einsum("nj,nk,nip->ijpk", a, a, X), atol=1e-12)


def cut(values):
    """What tensor cores take of numbers."""
    return (values.view(torch.int32) & ~0x1FFF).view(torch.float32)


def test_split():
    """The high part is of TF32; both are the number, and cut to TF32 but for 2**-21 of it, of both signs."""
    values = torch.randn(100_000) * 10.0 ** torch.randint(-30, 30, (100_000,))
    high, low = split(values, torch.empty_like(values), torch.empty_like(values))
    assert torch.equal(cut(high), high)
    assert torch.equal(high.double() + low.double(), values.double())
    lost = (values.double() - high.double() - cut(low).double()) / values.double()
    assert lost.abs().max() <= 2.0**-21
    assert lost.mean().abs() < 2.0**-26
    assert not torch.equal(values, high)


def test_products_of_split_numbers_are_those_of_float32():
    """As one product of TF32 is not."""
    a, b = torch.randn(60, 4000), torch.randn(4000, 50)
    known, out = a.double() @ b.double(), torch.ones(60, 50)
    Workspace(splits=True).multiply(a, b, out, adds=True)
    size = a.double().abs() @ b.double().abs()  # what rounding is in proportion to
    assert ((out.double() - 1 - known).abs() / size).max() < 1e-6
    high, _ = split(a, torch.empty_like(a), torch.empty_like(a))
    assert ((high.double() @ b.double() - known).abs() / size).max() > 1e-6
    before = b.clone()
    Workspace(splits=True).multiply(a, b, out, adds=False)
    assert torch.equal(b, before)
    Workspace(splits=True).multiply(a, b, out, adds=False, keeps=False)
    assert ((out.double() - known).abs() / size).max() < 1e-6


def test_splits_float32_alone():
    a, b = random(5, 30), random(30, 4)
    out = torch.empty(5, 4, dtype=torch.float64)
    Workspace(splits=True).multiply(a, b, out, adds=False)
    np.testing.assert_allclose(out, a @ b, atol=1e-13)


@settings(max_examples=30, deadline=None)
@given(sizes, sizes, sizes, sizes, sizes, st.booleans())
def test_tangents(directions, samples, positions, outputs, inputs, has_second):
    b, dz = random(samples, positions, inputs), random(directions, samples, positions, outputs)
    delta, db = random(samples, positions, outputs), random(directions, samples, positions, inputs) * has_second
    known = torch.einsum("nsk,tnsp->ntpk", b, dz) + torch.einsum("nsp,tnsk->ntpk", delta, db)
    found = tangents(b, dz, delta, db if has_second else None, Workspace())
    np.testing.assert_allclose(found, known.reshape(samples * directions, outputs * inputs), atol=1e-12)
