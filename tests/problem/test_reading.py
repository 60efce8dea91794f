"""What people have as data becomes batches; what is no fixed set of samples is refused."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pipeline import ProblemError
from pipeline.problem.batches import sample_count
from pipeline.problem.reading import read_batches

X, Y = torch.arange(12.0).reshape(6, 2), torch.arange(6)


@dataclass(frozen=True)
class Record:
    x: torch.Tensor
    y: torch.Tensor


class Endless(Dataset):
    """Has no length; ends as Python's own protocol says."""

    def __getitem__(self, k):
        if k == 6:
            raise IndexError
        return X[k], Y[k]


READ = {
    "a pair": (X, Y),
    "arrays of the other byte order": (X.numpy().astype(">f4"), Y.numpy()),
    "a mapping": {"x": X, "y": Y},
    "an object": Record(X, Y),
    "a dataset": TensorDataset(X, Y),
    "a dataset without a length": Endless(),
    "a loader": DataLoader(TensorDataset(X, Y), batch_size=4),
    "a list of batches": [(X[:4], Y[:4]), [X[4:], Y[4:]]],
}


@pytest.mark.parametrize("name", READ)
def test_all_samples_in_their_order(name):
    batches = read_batches(READ[name], separable=True)
    assert sum(map(sample_count, batches)) == 6
    parts = [(b.x, b.y) if isinstance(b, Record) else tuple(b.values()) if isinstance(b, dict) else b for b in batches]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), X)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), Y)


def changing():
    class Changing:
        def __iter__(self):
            yield torch.rand(2, 2), Y[:2]

    return Changing()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "got no batches"),
        (X, "got Tensor, expected a tuple"),
        (iter([(X, Y)]), "can be read only once"),
        (DataLoader(TensorDataset(X, Y), shuffle=True), "shuffles"),
        (DataLoader(TensorDataset(X, Y), batch_size=4, drop_last=True), "drops its last batch"),
        (DataLoader(TensorDataset(X, Y), batch_size=None), "gives samples, not batches"),
        (changing(), "two passes gave different batches"),
        ((X, Y[:3]), "6 in .*3 in"),
        ((X[:0], Y[:0]), "at least one sample"),
        ((X, torch.tensor(1.0)), "got a 0-d tensor"),
        ((X, "labels"), "got str, expected a tensor"),
        ((np.array(["a", "b"]), Y), "expected numbers"),
        ([(np.array([[1], [1, 2]], dtype=object), Y[:2])], "regular shape"),
    ],
)
def test_refused(data, message):
    with pytest.raises(ProblemError, match=message):
        read_batches(data, separable=True)


def test_samples_that_belong_together():
    (batch,) = read_batches((X, Y[:3]), separable=False)
    assert batch[1] is Y[:3] or len(batch[1]) == 3
    with pytest.raises(ProblemError, match="2 batches of a loss that is not separable"):
        read_batches([(X, Y), (X, Y)], separable=False)


def test_what_a_users_code_raises_is_an_error_of_ours():
    class Broken(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, k):
            raise ZeroDivisionError(k)

    with pytest.raises(ProblemError, match="ZeroDivisionError"):
        read_batches(Broken(), separable=True)
