"""Single precision that is written into code, evaluated in double; the rest as it is."""

import pytest
import torch

from pipeline.problem.lifting import evaluated_in

HELD = torch.tensor([0.1])


@pytest.mark.parametrize(
    "made",
    [
        lambda: HELD + torch.ones(1),
        lambda: torch.ones(1, dtype=torch.float64).float(),
        lambda: torch.zeros(1, dtype=torch.float32),
        lambda: torch.ones(1).to(torch.float32),
        lambda: torch.ones(1).type("torch.FloatTensor"),
        lambda: torch.cat([HELD, torch.ones(1, dtype=torch.float64)]),
        lambda: torch.ones(1),
    ],
)
def test_single_becomes_double(made):
    with evaluated_in(torch.float64):
        assert made().dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32


def test_complex_numbers_too():
    with evaluated_in(torch.float64):
        assert torch.ones(1, dtype=torch.complex64).dtype == torch.complex128


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32])
def test_other_types_are_left(dtype):
    with evaluated_in(torch.float64):
        assert torch.ones(1, dtype=dtype).dtype == dtype


def test_what_is_written_into_keeps_its_type():
    into = torch.zeros(1)
    with evaluated_in(torch.float64):
        into += torch.ones(1, dtype=torch.float64)
        into[0] = HELD[0]
    assert into.dtype == torch.float32
    assert float(into) == pytest.approx(0.1)


def test_random_numbers_are_those_of_the_models_type():
    torch.manual_seed(3)
    drawn = torch.randn(4)
    torch.manual_seed(3)
    with evaluated_in(torch.float64, own=torch.float32):
        found = torch.randn(4)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, drawn.double(), rtol=0, atol=0)


def test_a_run_in_single_precision_is_left_alone():
    with evaluated_in(torch.float32):
        assert (HELD + torch.ones(1)).dtype == torch.float32
