"""Stored matrices of both symmetries and types, ragged in chunks and parameters, whole and as a view."""

import itertools

import pytest
from finished import P, pair

KINDS = [
    *({"symmetry": s, "dtype": d} for s, d in itertools.product(["mirrored", "upper"], ["float32", "float64"])),
    {"view": ["*.weight"]},
    {"view": ["!0.weight"], "chunk": 7, "symmetry": "mirrored"},
    {"view": ["0.bias", "1.*"], "chunk": 64},
]


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def kind(request):
    return request.param


@pytest.fixture
def case(kind):
    """An indefinite one of each kind."""
    return pair(**kind)


@pytest.fixture
def beyond_memory(monkeypatch):
    """Let nothing as large as the matrix fit."""
    for module in ("view", "products", "spectrum", "solve"):
        monkeypatch.setattr(f"pipeline.analysis.{module}.available_bytes", lambda: 8 * P * P - 1)
