"""Products of tiles: those of a dense product, and what a changed entry does to them."""

import numpy as np
import pytest
import torch

from pipeline.storage.tile_products import COUNT, StoredProducts, TileProducts, check_vectors, from_text

P, ROWS, COLS = 20, range(4, 12), range(6, 20)
H = np.random.default_rng(0).standard_normal((P, P))
V = check_vectors("5595494c21bdbfde", P)
PARTS = [(range(4, 8), range(6, 12)), (range(8, 12), range(8, 12)), (range(4, 12), range(12, 20))]


def part(rows, cols, of=H):
    return of[rows.start : rows.stop, cols.start : cols.stop]


def filled(products, of=H):
    for rows, cols in PARTS:
        products.add(part(rows, cols, of), rows, cols)
    return products


def upper():
    """What the parts hold at or right of the diagonal."""
    held = np.zeros((P, P))
    for rows, cols in PARTS:
        held[rows.start : rows.stop, cols.start : cols.stop] = part(rows, cols)
    return np.triu(held)


def test_vectors_are_the_same_everywhere():
    assert V.shape == (P, COUNT)
    np.testing.assert_array_equal(V, check_vectors("5595494c21bdbfde", P))
    assert ((abs(V) >= 0.5) & (abs(V) < 1.5)).all()
    assert (V > 0).any()
    assert (V < 0).any()
    assert not np.array_equal(V, check_vectors("5595494c21bdbfdf", P))
    np.testing.assert_array_equal(check_vectors("5595494c21bdbfde", 5), V[:5])  # to the bit, whatever P


def test_products_are_those_of_the_upper_part():
    found, U = filled(TileProducts(np, V, ROWS, COLS)), upper()
    np.testing.assert_allclose(found.right, (U @ V)[ROWS.start : ROWS.stop])
    np.testing.assert_allclose(found.down, (np.triu(U, 1).T @ V)[COLS.start : COLS.stop])


def test_torch_gives_what_numpy_gives():
    ours = TileProducts(torch, torch.from_numpy(V), ROWS, COLS)
    for rows, cols in PARTS:
        ours.add(torch.from_numpy(part(rows, cols)), rows, cols)
    np.testing.assert_allclose(from_text(ours.to_text()), from_text(filled(TileProducts(np, V, ROWS, COLS)).to_text()))


def test_what_is_stored_as_it_was_computed_has_no_fault():
    text = filled(TileProducts(np, V, ROWS, COLS)).to_text()
    assert filled(StoredProducts(V, ROWS, COLS)).fault_of(text) is None
    assert filled(StoredProducts(V, ROWS, COLS)).fault_of("") is None


@pytest.mark.parametrize(("i", "j"), [(4, 6), (7, 19), (11, 11), (9, 15)])
@pytest.mark.parametrize("by", [1e-9, 1e300, np.inf, -np.inf, np.nan])
def test_a_changed_entry_is_named(i, j, by):
    text = filled(TileProducts(np, V, ROWS, COLS)).to_text()
    wrong = H.copy()
    wrong[i, j] += by
    with np.errstate(all="ignore"):
        fault = filled(StoredProducts(V, ROWS, COLS), wrong).fault_of(text)
    assert fault.endswith((f"row {i} is off", f"column {j} is off"))


def test_entries_left_of_the_diagonal_mean_nothing():
    wrong = H.copy()
    wrong[11, 8] = 1e6
    text = filled(TileProducts(np, V, ROWS, COLS)).to_text()
    found = filled(TileProducts(np, V, ROWS, COLS), wrong).to_text()
    assert found == text


@pytest.mark.parametrize("text", ["AAAA", "not base64", "AAAAAAAAAAA="])
def test_what_are_no_products(text):
    found = filled(StoredProducts(V, ROWS, COLS))
    assert found.fault_of(text) == "its receipt holds no products of its shape"
