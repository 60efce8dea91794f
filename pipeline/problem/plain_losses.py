"""Losses of torch written out by operations that can be differentiated twice; as in `plain_forms.py`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.problem.plain_forms import Written


def multi_margin_loss(
    scores: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Written:
    """Mean over classes of max(0, margin - own score + score)^p, the own class left out."""
    if size_average is not None or reduce is not None or p not in (1, 2) or scores.dim() > 2:
        return NotImplemented
    table, own = scores.reshape(-1, scores.shape[-1] if scores.dim() else 1), target.reshape(-1, 1)
    if len(table) != len(own):
        return NotImplemented
    gaps = F.relu(margin - table.gather(1, own) + table)  # not clamp_min: its slope at 0 is 1, torch's here is 0
    gaps = gaps * gaps if p == 2 else gaps
    if weight is not None:
        gaps = gaps * weight[own]
    others = torch.arange(table.shape[1], device=own.device) != own
    return _reduced((gaps * others).sum(1).div(table.shape[1]).reshape(target.shape), reduction)


def multilabel_margin_loss(
    scores: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Written:
    """Mean over classes of max(0, 1 - label's score + score), summed over the labels, which end at the first -1."""
    if size_average is not None or reduce is not None or scores.shape != target.shape or scores.dim() > 2:
        return NotImplemented
    classes = scores.shape[-1] if scores.dim() else 1
    table, labels = scores.reshape(-1, classes), target.reshape(-1, classes)
    given = (labels >= 0).cumprod(1)
    labels = labels * given
    among = torch.zeros_like(labels).scatter_add(1, labels, given) > 0  # shape: (samples, classes)
    gaps = F.relu(1 - table.gather(1, labels).unsqueeze(2) + table.unsqueeze(1))  # shape: (samples, labels, classes)
    counted = given.unsqueeze(2) * ~among.unsqueeze(1)
    return _reduced((gaps * counted).sum((1, 2)).div(classes).reshape(scores.shape[:-1]), reduction)


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Written:
    """Minus the log-probability of all alignments of a sequence with its labels."""
    if log_probs.dim() not in (2, 3) or not log_probs.numel():
        return NotImplemented
    table = log_probs if log_probs.dim() == 3 else log_probs.unsqueeze(1)
    steps, sizes = (torch.as_tensor(n, device=table.device).reshape(-1) for n in (input_lengths, target_lengths))
    if len(steps) != table.shape[1] or len(sizes) != table.shape[1] or int(steps.max()) > len(table):
        return NotImplemented
    labels = _padded_labels(targets.to(table.device), sizes).clamp(0, table.shape[2] - 1)
    losses = _alignment_losses(table, labels, steps, sizes, blank)
    if zero_infinity:
        losses = torch.where(losses.isinf(), 0.0, losses)
    if reduction == "mean":
        losses = losses / sizes.clamp_min(1)
    return _reduced(losses if log_probs.dim() == 3 else losses.squeeze(0), reduction)


def _padded_labels(targets: Tensor, sizes: Tensor) -> Tensor:
    """Return the labels of each sample in a row, with anything behind them.  # shape: (samples, most labels)."""
    most = int(sizes.max())
    if targets.dim() == 2:
        return targets[:, :most]
    place = (sizes.cumsum(0) - sizes).unsqueeze(1) + torch.arange(most, device=sizes.device)
    return targets[place.clamp_max(max(len(targets) - 1, 0))] if most else targets.new_zeros(len(sizes), 0)


def _alignment_losses(table: Tensor, labels: Tensor, steps: Tensor, sizes: Tensor, blank: int) -> Tensor:
    """Go forward through the lattice of blank, label, blank, ..., blank.

    Args:
        table: log-probabilities.  # shape: (steps, samples, classes)
        labels: those behind a sample's own do not matter.  # shape: (samples, most labels)
        steps: of each sample.  # shape: (samples,)
        sizes: labels of each sample.  # shape: (samples,)
        blank: the class between labels.

    Returns:
        The loss of each sample, infinite where there is no alignment.  # shape: (samples,)
    """
    never = torch.finfo(table.dtype).min / 4  # in the place of -inf, whose derivatives are not finite
    states = labels.new_full((len(labels), 2 * labels.shape[1] + 1), blank)
    states[:, 1::2] = labels
    skips = torch.zeros_like(states, dtype=torch.bool)  # from one label to another, without a blank
    skips[:, 3::2] = labels[:, 1:] != labels[:, :-1]
    emitted = table.gather(2, states.expand(len(table), -1, -1))  # shape: (steps, samples, states)
    forward = torch.where(torch.arange(states.shape[1], device=table.device) < 2, emitted[0], never)
    for step in range(1, len(table)):
        behind = F.pad(forward, (1, 0), value=never)[:, :-1]
        skipped = torch.where(skips, F.pad(forward, (2, 0), value=never)[:, :-2], never)
        moved = torch.stack([forward, behind, skipped]).logsumexp(0) + emitted[step]
        forward = torch.where((step < steps).unsqueeze(1), moved, forward)
    last = forward.gather(1, 2 * sizes.unsqueeze(1))
    label = forward.gather(1, (2 * sizes - 1).clamp_min(0).unsqueeze(1))
    label = torch.where(sizes.unsqueeze(1) > 0, label, never)
    losses = -torch.cat([last, label], 1).logsumexp(1)
    losses = torch.where(losses > -never / 2, torch.inf, losses)
    return torch.where(steps > 0, losses, torch.where(sizes > 0, torch.inf, 0.0))


def linear_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> Written:
    """Cross-entropy of a linear layer, not chunked: chunks hold first derivatives alone."""
    return NotImplemented if options is None else F.linear_cross_entropy(*args, **kwargs)


def _reduced(losses: Tensor, reduction: str) -> Written:
    """Reduce losses as torch's own are."""
    known: dict[str, Callable[[Tensor], Tensor]] = {"none": Tensor.clone, "mean": torch.mean, "sum": torch.sum}
    return known[reduction](losses) if reduction in known else NotImplemented
