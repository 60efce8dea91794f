"""Products of a tile with the vectors of its run: rounding passes, a changed entry does not, whatever the magnitude."""

import numpy as np
import pytest
import torch

from pipeline.storage.tile_products import COUNT, StoredProducts, TileProducts, check_vectors, from_text

P, ROWS, COLS = 40, range(8, 24), range(8, 40)


def entries(magnitude):
    """A tile on the diagonal; the part left of it is not looked at."""
    return magnitude * np.random.default_rng(0).normal(size=(len(ROWS), len(COLS)))


def receipt(part):
    products = TileProducts(np, check_vectors("ab" * 16, P), ROWS, COLS)
    products.add(part, ROWS, COLS)
    return products.to_text()


def fault(part, text):
    """Of what is stored, added by bands: in another order."""
    stored = StoredProducts(check_vectors("ab" * 16, P), ROWS, COLS)
    for start in range(0, len(ROWS), 4):
        stored.add(part[start : start + 4], ROWS[start : start + 4], COLS)
    return stored.fault_of(text)


MAGNITUDES = [1.0, 1e-170, 1e170, 1e-300, 1e-310]


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_what_is_stored_as_computed(magnitude):
    assert fault(entries(magnitude), receipt(entries(magnitude))) is None


@pytest.mark.parametrize("magnitude", MAGNITUDES[:-1])
@pytest.mark.parametrize("entry", [(0, 0), (3, 17), (15, 31)])
def test_an_entry_that_changed(magnitude, entry):
    changed = entries(magnitude)
    changed[entry] *= -1
    assert "is off" in fault(changed, receipt(entries(magnitude)))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e300])
def test_an_entry_whose_exponent_changed(value):
    changed = entries(1.0)
    changed[3, 17] = value
    with np.errstate(invalid="ignore"):
        assert fault(changed, receipt(entries(1.0))).endswith(("row 11 is off", "column 25 is off"))


def test_vectors_are_the_same_in_every_process():
    v = check_vectors("ab" * 16, P)
    assert ((abs(v) >= 0.5) & (abs(v) < 1.5)).all()
    assert (v > 0).any()
    assert (v < 0).any()
    np.testing.assert_array_equal(v[:5], check_vectors("ab" * 16, 5))
    assert not np.array_equal(v, check_vectors("ac" * 16, P))


def test_torch_gives_what_numpy_gives():
    products = TileProducts(torch, torch.from_numpy(check_vectors("ab" * 16, P)), ROWS, COLS)
    products.add(torch.from_numpy(entries(1.0)), ROWS, COLS)
    np.testing.assert_allclose(from_text(products.to_text()), from_text(receipt(entries(1.0))), rtol=1e-12)


def test_entries_left_of_the_diagonal_mean_nothing():
    changed = entries(1.0)
    changed[5, 2] = 1e6
    assert receipt(changed) == receipt(entries(1.0))


def test_definition():
    """U V, and (U - diagonal)' V, of the entries at or right of the diagonal of H."""
    part, v = entries(1.0), check_vectors("ab" * 16, P)
    upper = np.triu(part)
    right, down = np.split(from_text(receipt(part)), [len(ROWS)])
    assert right.shape == (len(ROWS), COUNT)
    np.testing.assert_allclose(right, upper @ v[COLS.start : COLS.stop], rtol=1e-12)
    np.testing.assert_allclose(down, np.triu(part, 1).T @ v[ROWS.start : ROWS.stop], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("text", ["no base64", "AAAA", ""])
def test_a_receipt_of_another_form(text):
    said = fault(entries(1.0), text)
    assert (said is None) == (text == "")
    assert text == "" or "no products of its shape" in said
