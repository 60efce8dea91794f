"""What a loss does, seen at its first evaluations: what has to be written out, what it leaves, assigns and changes."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pipeline.errors import ProblemError
from pipeline.problem.batches import Batch, copied, is_cuttable, take
from pipeline.problem.contexts import on_copies
from pipeline.problem.kept import Kept
from pipeline.problem.written_out import WrittenOut

FEW = 4  # samples, in which it is looked for what to write out,
MANY = 1024  # and, without a graph, what only a larger batch leaves


class Seen(NamedTuple):
    """What the first evaluations of a loss showed.

    Attributes:
        written_out: names of operations that are; None where one evaluation raises, which it does again where that can
            be explained.
        leaves: whether the model then holds what it did not before, and another evaluation may read.
        assigns: whether `.data` of some tensor is assigned.
        writes: whether the data are written into.
    """

    written_out: frozenset[str] | None = None
    leaves: bool = False
    assigns: bool = False
    writes: bool = False


def first_look(
    modules: Sequence[nn.Module], evaluate: Callable[[Batch], object], batches: Sequence[Batch], *, may_cut: bool
) -> Seen:
    """Look at what a loss does, by evaluating a few samples of the first and the last batch.

    Args:
        modules: the model, and others that the loss holds.
        evaluate: evaluates a batch.
        batches: all data.
        may_cut: whether some samples of a batch are one.

    Returns:
        What was seen.

    Raises:
        ProblemError: the model makes parameters of its own in a forward pass.
    """
    ends = [batches[0], batches[-1]]

    def some(count: int) -> list[Batch]:
        return [copied(take(b, slice(0, count)) if may_cut and is_cuttable(b) else b) for b in ends]

    model = modules[0]
    parameters = {name for name, _ in model.named_parameters()}
    with on_copies(*modules), WrittenOut() as mode:
        kept, names, few = Kept(*modules), None, [*some(1), *some(FEW)]
        with suppress(Exception):
            for batch in few:
                evaluate(batch)
            names = frozenset(mode.replaced)
        with suppress(Exception), torch.no_grad():
            for batch in some(MANY):
                evaluate(batch)
        if made := [name for name, _ in model.named_parameters() if name not in parameters]:
            raise ProblemError(f"model: `{made[0]}` is made by the first forward pass: call model(inputs) once before")
        written = any(leaf._version for leaf in tree_leaves(few) if isinstance(leaf, Tensor))
        return Seen(names, not kept.is_as_it_was(), mode.assigned, written)
