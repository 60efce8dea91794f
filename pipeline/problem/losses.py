"""Losses as un-normalised sums: (sum, weight), so that any split into micro-batches adds up exactly.

A mean over a batch is sum / weight. What the weight counts differs from loss to loss: the terms for most, the class
weights of the targets that are not ignored for cross-entropy.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from pipeline.errors import ProblemError
from pipeline.problem.batches import Batch, sample_count

Reduction = Literal["mean", "sum"]
SumAndWeight = tuple[Tensor, Tensor]
Targets = tuple[Any, ...]  # what a loss takes beside the output: the target, and what follows it in a batch
Terms = Callable[[Any, Targets, Batch], SumAndWeight]  # (output, targets, batch) -> (sum, weight)


def as_terms(loss: Callable[..., Any], reduction: Reduction | None) -> tuple[Terms, Terms | None, Reduction]:
    """Turn a loss into a function that gives (sum, weight).

    Args:
        loss: a loss of torch.nn or torch.nn.functional (with `functools.partial` for its keywords), or a callable
            (output, target) that gives a scalar or (sum, weight). A torch loss of several inputs takes them from
            tuples: (x1, x2) and a target, (anchor, positive, negative) and None, (mean, variance) and a target, log
            probabilities and (targets, input lengths, target lengths).
        reduction: for a callable that gives a scalar: whether that is the mean (default) or the sum over samples.

    Returns:
        The function; one that gives a loss of torch as torch reduces it, with weight 1, None for any other; and whether
        the whole loss is the sum divided by the weight ("mean") or the sum.

    Raises:
        ProblemError: the loss is not callable, or of a reduction that has no value.
    """
    if not callable(loss) or isinstance(loss, type):
        got = f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__
        instead = f": write {loss.__name__}()" if isinstance(loss, type) else ""
        raise ProblemError(f"loss: got {got}, expected a callable (output, target){instead}")
    own = _torch_reduction(loss)
    if own is None:
        chosen = known_reduction(reduction)
        return functools.partial(_scalar_terms, loss, chosen), None, chosen
    if own not in ("mean", "sum", "batchmean"):
        raise ProblemError(f"loss: got reduction={own!r}, expected 'mean' or 'sum'")
    if reduction is not None and reduction != own:
        raise ProblemError(
            f"loss: {_name(loss)} has reduction={own!r}, but the problem says {reduction!r}: leave it out"
        )
    terms = functools.partial(_torch_terms, _elementwise(loss), loss, own)
    return terms, functools.partial(_torch_value, loss), "sum" if own == "sum" else "mean"


def known_reduction(reduction: Reduction | None) -> Reduction:
    """Take what the caller says of a loss; a mean where nothing is said.

    Args:
        reduction: what is said.

    Returns:
        The reduction.

    Raises:
        ProblemError: it is none.
    """
    if reduction not in {None, "mean", "sum"}:
        raise ProblemError(f"reduction: got {reduction!r}, expected 'mean' or 'sum'")
    return reduction or "mean"


def _torch_reduction(loss: Any) -> str | None:
    """Return the reduction of a loss of torch.nn or torch.nn.functional, None for any other callable."""
    function = _function(loss)
    if type(function).__module__ == "torch.nn.modules.loss" and hasattr(function, "reduction"):
        return str(function.reduction)
    if getattr(function, "__module__", "") == "torch.nn.functional":
        signature = inspect.signature(loss)
        if "reduction" in signature.parameters:
            return str(signature.parameters["reduction"].default)
    return None


def _elementwise(loss: Any) -> Callable[..., Tensor]:
    """Return a torch loss that does not reduce."""
    if isinstance(loss, nn.Module):
        copied = copy.copy(loss)
        copied.reduction = "none"  # type: ignore[assignment]
        return copied
    return functools.partial(loss, reduction="none")


def _like(loss: Any, output: Any) -> Any:
    """Return a loss whose own tensors (class weights, say) are of the output's floating type, on its device."""
    floats = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not floats:
        return loss

    def cast(value: Any) -> Any:
        return value.to(floats[0]) if isinstance(value, Tensor) and value.is_floating_point() else value

    if isinstance(loss, functools.partial):
        return functools.partial(loss.func, *map(cast, loss.args), **{k: cast(v) for k, v in loss.keywords.items()})
    if isinstance(loss, nn.Module):
        tensors = {name: cast(t) for name, t in [*loss.named_parameters(), *loss.named_buffers()]}
        return (lambda *args: functional_call(loss, tensors, args)) if tensors else loss
    return loss


def _torch_terms(
    elementwise: Callable[..., Tensor], loss: Any, reduction: str, output: Any, targets: Targets, _: Batch
) -> SumAndWeight:
    """Add up a torch loss; see `torch.nn` for what each mean divides by."""
    function = _function(loss)
    arguments = _arguments(function, output, targets)
    target = targets[0]
    terms = _like(elementwise, output)(*arguments)
    if _is(function, nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss) and not target.is_floating_point():
        return terms.sum(), _class_weight(loss, target, terms)
    if _is(function, nn.CTCLoss, F.ctc_loss) and reduction == "mean":
        terms = terms / arguments[3].clamp(min=1).to(terms)  # each by the length of its target
    count = len(terms) if reduction == "batchmean" else terms.numel()
    return terms.sum(), terms.new_full((), float(count))


def _torch_value(loss: Any, output: Any, targets: Targets, _: Batch) -> SumAndWeight:
    """Return a torch loss as torch itself reduces it."""
    value = _like(loss, output)(*_arguments(_function(loss), output, targets))
    return value, torch.ones_like(value)


def _function(loss: Any) -> Any:
    return loss.func if isinstance(loss, functools.partial) else loss


def _arguments(function: Any, output: Any, given: Targets) -> tuple[Tensor, ...]:
    """Lay out what a torch loss takes: outputs, then targets, either of which may be several."""
    outputs = output if isinstance(output, tuple) else (output,)
    first = () if given[0] is None else given[0] if isinstance(given[0], tuple | list) else given[:1]
    targets = (*first, *given[1:])
    if wrong := [value for value in (*outputs, *targets) if not isinstance(value, Tensor)]:
        raise ProblemError(
            f"loss: {_name(function)} takes tensors, got {type(wrong[0]).__name__}: pass a callable (output, target) "
            "that picks them, such as lambda out, y: cross_entropy(out.logits, y)"
        )
    if _is(function, nn.GaussianNLLLoss, F.gaussian_nll_loss) and len(outputs) == 2:
        return outputs[0], *targets, outputs[1]  # mean and variance, with the target between them
    return *outputs, *targets


def _is(function: Any, *losses: Any) -> bool:
    return any(isinstance(function, loss) if isinstance(loss, type) else function is loss for loss in losses)


def _class_weight(loss: Any, target: Tensor, terms: Tensor) -> Tensor:
    """Sum the class weights of the targets that are not ignored."""
    options: dict[str, Any] = loss.keywords if isinstance(loss, functools.partial) else {}
    if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
        options = {"weight": loss.weight, "ignore_index": loss.ignore_index}
    counted, weight = target.ne(options.get("ignore_index", -100)), options.get("weight")
    if weight is None:
        return counted.sum().to(terms.dtype)
    total: Tensor = (weight.to(terms)[torch.where(counted, target, 0)] * counted).sum()
    return total


def _scalar_terms(
    loss: Callable[..., Any], reduction: Reduction, output: Any, targets: Targets, batch: Batch
) -> SumAndWeight:
    """Add up a loss of the user's."""
    return sum_and_weight(_like(loss, output)(output, *targets), reduction, batch, f"loss: {_name(loss)}")


def sum_and_weight(value: Any, reduction: Reduction, batch: Batch, name: str) -> SumAndWeight:
    """Take what a user's function returned: a scalar, or (sum, weight).

    Args:
        value: what it returned.
        reduction: whether a scalar is the mean or the sum over samples.
        batch: that it is of.
        name: named in errors.

    Returns:
        The pair, both 0-d tensors of one type.

    Raises:
        ProblemError: it is neither a scalar tensor nor a pair of one and a number.
    """
    if isinstance(value, tuple) and len(value) == 2:
        total, weight = value
        is_number = isinstance(weight, int | float | np.number) or (isinstance(weight, Tensor) and weight.numel() == 1)
        if isinstance(total, Tensor) and total.numel() == 1 and is_number:
            return total.reshape(()), _number(weight, total)
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        if isinstance(value, tuple):
            got = f"({', '.join(type(each).__name__ for each in value)})"
        raise ProblemError(f"{name} gave {got}, expected a scalar tensor or (sum, weight)")
    count = sample_count(batch)
    scale = count if reduction == "mean" else 1
    return value.reshape(()) * scale, value.new_full((), float(count))


def _number(value: Any, like: Tensor) -> Tensor:
    """Return a number as a 0-d tensor of another one's type, on its device."""
    if isinstance(value, int | float | np.number):
        return like.new_full((), float(value))  # filled there: nothing is copied to a device
    return torch.as_tensor(value, device=like.device).to(like.dtype).reshape(())


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
