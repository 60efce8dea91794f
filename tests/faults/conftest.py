import numpy as np
import pytest


@pytest.fixture
def faults():
    def note(fault, where, times, repeated, tiles, found, known):
        np.testing.assert_array_equal(found, known)

    return note
