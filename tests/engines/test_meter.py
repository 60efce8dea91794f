"""What a call takes, by torch's old profiler: FLOPs as torch's own counter has them, bytes as they were allocated."""

import pytest
import torch
import zoo
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline import Problem
from pipeline.engines.cost import Segment
from pipeline.engines.meter import metered
from pipeline.preflight.engine_sizes import choose_sizes
from pipeline.problem.contexts import exact_kernels

CPU = torch.device("cpu")
MEBI = 2**20


def took(call, counted=False, dtype=torch.float32):
    return metered(call, CPU, dtype, 1, counted=counted)


def test_bytes_beyond_those_before():
    before = torch.zeros(MEBI, dtype=torch.uint8)

    def call():
        first = torch.ones(3 * MEBI, dtype=torch.uint8)
        del first
        second = before.view(2, -1) + 1
        return torch.cat([second, second])

    assert took(call).peak_bytes == 3 * MEBI
    assert took(lambda: before.view(2, -1).t()).peak_bytes == 0


def test_bytes_while_something_of_before_goes():
    kept = [torch.zeros(4 * MEBI, dtype=torch.uint8)]

    def call():
        kept.clear()
        torch.ones(3 * MEBI, dtype=torch.uint8)

    assert took(call).peak_bytes >= 3 * MEBI


def test_bytes_of_a_backward_pass():
    x = torch.ones(MEBI, requires_grad=True)
    both = 2 * x.nbytes  # the exponential, and the gradient
    assert both <= took(lambda: x.exp().sum().backward()).peak_bytes < 1.01 * both


NETS = {
    "products": (nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (5, 4)),
    "attention": (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (3, 5, 8)),
    "convolution": (
        nn.Sequential(nn.Conv2d(2, 4, 3, stride=2), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1)),
        (5, 2, 9, 9),
    ),
    "one dimension": (nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Conv1d(4, 1, 2, dilation=2)), (5, 2, 9)),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(4, 2, 3, stride=2), nn.Tanh(), nn.Conv2d(2, 3, 2)), (5, 4, 5, 5)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETS)
def test_flops_are_those_of_torch(name, dtype):
    model, shape = NETS[name]
    model, x = model.to(dtype), torch.randn(shape, dtype=dtype)
    parameters = dict(model.named_parameters())

    def loss(values):
        return torch.func.functional_call(model, values, (x,)).square().sum()

    def call():
        first = next(iter(parameters))
        gradient = lambda one: torch.func.grad(loss)(parameters | {first: one})[first]
        value, pull = torch.func.vjp(gradient, parameters[first].detach())
        torch.func.vmap(pull)(torch.randn(3, *value.shape, dtype=dtype))

    with exact_kernels(model):
        with FlopCounterMode(display=False) as counter:
            call()
        found = took(call, counted=True, dtype=dtype).flops
    assert found == counter.get_total_flops() > 0


def test_errors_of_the_call_are_its_own():
    def call():
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        took(call)
    assert took(lambda: torch.ones(MEBI)).peak_bytes == 4 * MEBI


def profiler():
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


def sizes_of(case, loss=None):
    """Micro-batch and row group that are chosen for an engine, with all its calls measured."""
    problem = case.problem if loss is None else Problem(case.problem.model, loss, case.whole_batch, reduction="mean")
    placed = problem.place(torch.float64)
    segments = [Segment.of(p, range(p.offset, placed.layout.size), "jacrev", {}) for p in placed.layout]
    return choose_sizes(placed, segments, 2**30, None, None)


def test_inside_a_profiler_of_the_caller():
    with profiler() as profiled:
        found = sizes_of(zoo.mlp())
    assert found.sizes == sizes_of(zoo.mlp()).sizes  # all there is, in both
    assert {cost.flops for cost in found.costs.values()} == {0}
    assert profiled.events()


def test_around_a_profiler_of_the_loss():
    profiled = []

    def loss(out, target):
        with profiler() as one:
            value = nn.functional.cross_entropy(out, target)
        profiled.append(one)
        return value

    assert sizes_of(zoo.mlp(), loss).sizes == sizes_of(zoo.mlp()).sizes
    assert profiled
    assert took(lambda: torch.ones(MEBI)).peak_bytes == 4 * MEBI


def test_the_process_stands_for_what_was_alive():
    def call():
        return [torch.ones(64 * MEBI, dtype=torch.uint8), torch.randn(4 * MEBI).exp()]

    with profiler():
        assert took(call).peak_bytes > 32 * MEBI  # memory that the process had free already does not show
