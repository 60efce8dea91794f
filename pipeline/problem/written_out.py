"""Where torch's second derivatives are missing or wrong: what is written out, and what the user has to write otherwise.

Each function in `PLAIN` has, in torch, no double backward; or a wrong one (weight norm, chunked cross-entropy, sinc at
0; Bessel functions and polynomials count as constants); or one that `torch.func.vmap` cannot pull back, or does wrongly
(an index without a dimension, channels-last pooling, products with sparse matrices). `WrittenOut` puts the forms of
`plain_forms.py`, `plain_losses.py` and `plain_special.py` in their places. `REMEDIES` is for what has no such form.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, special
from torch.overrides import TorchFunctionMode

from pipeline.problem import plain_forms, plain_losses, plain_special
from pipeline.problem.modes import within


class Plain(NamedTuple):
    """A form that takes the place of an operation.

    Attributes:
        name: of the operation, in words.
        form: takes the operation's arguments; gives its value, or NotImplemented where the operation itself is to run.
    """

    name: str
    form: Callable[..., Any]


def _each(name: str, form: Callable[..., Any], *functions: Any) -> dict[Any, Plain]:
    """Register one form for several spellings of an operation."""
    return dict.fromkeys(functions, Plain(name, form))


def _each_its_own(name: str, form_of: Callable[[Any], Callable[..., Any]], *functions: Any) -> dict[Any, Plain]:
    """Register for functions forms that are made of themselves."""
    return {function: Plain(name, form_of(function)) for function in functions}


def _each_special(name: str, form_of: Callable[[str], Callable[..., Any]], names: Iterable[str]) -> dict[Any, Plain]:
    """Register for functions of `torch.special` forms that are made of their names."""
    return {getattr(special, function): Plain(name, form_of(function)) for function in names}


WEIGHT_NORM = "weight norm"

# By what `__torch_function__` is told: a function of torch.nn.functional hides those that it calls itself.
PLAIN: dict[Any, Plain] = {
    torch._weight_norm: Plain(WEIGHT_NORM, plain_forms.weight_norm),
    torch.cdist: Plain("cdist", plain_forms.cdist),
    torch.pdist: Plain("pdist", plain_forms.pdist),
    F.embedding_bag: Plain("embedding bag", plain_forms.embedding_bag),
    F.multi_margin_loss: Plain("multi-margin loss", plain_losses.multi_margin_loss),
    F.multilabel_margin_loss: Plain("multi-label margin loss", plain_losses.multilabel_margin_loss),
    F.ctc_loss: Plain("CTC loss", plain_losses.ctc_loss),
    F.linear_cross_entropy: Plain("chunked cross-entropy", plain_losses.linear_cross_entropy),
    F.hardsigmoid: Plain("hardsigmoid", plain_forms.hardsigmoid),
    torch.segment_reduce: Plain("segment reduction", plain_forms.segment_reduce),
    **_each("sinc", plain_special.sinc, torch.sinc, special.sinc, Tensor.sinc),
    **_each_special("Bessel function", plain_special.bessel, plain_special.SLOPES),
    special.modified_bessel_i0: Plain("Bessel function", special.i0),
    special.modified_bessel_i1: Plain("Bessel function", special.i1),
    special.spherical_bessel_j0: Plain("Bessel function", plain_special.spherical_bessel_j0),
    **_each_special("orthogonal polynomial", plain_special.polynomial, plain_special.POLYNOMIALS),
    **_each("broadcast masked select", plain_forms.masked_select, torch.masked_select, Tensor.masked_select),
    **_each_its_own(
        "index without a dimension",
        plain_forms.one_index,
        *(getattr(torch, f"index_{what}") for what in ("select", "copy", "add", "reduce")),
        *(getattr(Tensor, f"index_{what}") for what in ("select", "copy", "add", "reduce", "copy_", "add_", "reduce_")),
    ),
    **_each_its_own(
        "channels-last max pooling",
        plain_forms.rows_first,
        *(getattr(F, f"{kind}{end}") for kind in plain_forms.POOLS for end in ("", "_with_indices")),
        torch.max_pool2d,
        torch.max_pool3d,
    ),
    **_each(
        "product with a sparse matrix",
        plain_forms.matmul,
        *(torch.mm, torch.mv, torch.matmul, torch.spmm, torch.sparse.mm, Tensor.mm, Tensor.mv, Tensor.matmul),
    ),
    **_each("product with a sparse matrix", plain_forms.addmm, torch.addmm, torch.sparse.addmm, Tensor.addmm),
}


_ASSIGN = Tensor.data.__set__  # type: ignore[attr-defined]


class WrittenOut(TorchFunctionMode):
    """Computes operations by forms that have right second derivatives, one call at a time.

    It costs some microseconds a call of any operation: to be used where `needed` names something.

    Args:
        only: names, as in `PLAIN`; all when None.

    Attributes:
        replaced: names of what was computed by another form so far.
        assigned: whether `.data` of some tensor was.
    """

    def __init__(self, only: Collection[str] | None = None) -> None:
        super().__init__()
        self.replaced: set[str] = set()
        self.assigned = False
        self._plain = {f: plain for f, plain in PLAIN.items() if only is None or plain.name in only}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        plain = self._plain.get(func)
        if plain is not None and (found := _written(plain, args, kwargs)) is not NotImplemented:
            self.replaced.add(plain.name)
            return found
        self.assigned |= func == _ASSIGN
        return within(self, func, args, kwargs)


def _written(plain: Plain, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Evaluate a form; the first argument of torch's own functions goes by the name of input."""
    if "out" in kwargs:
        return NotImplemented
    if "input" in kwargs:
        named = dict(kwargs)
        return plain.form(named.pop("input"), *args, **named)
    return plain.form(*args, **kwargs)


def needed(evaluate: Callable[[], object]) -> list[str]:
    """Find what of a loss has to be written out.

    Args:
        evaluate: evaluates it once.

    Returns:
        What was replaced, in words, in order: "cdist written out".
    """
    with WrittenOut() as mode:
        evaluate()
    return [f"{name} written out" for name in sorted(mode.replaced)]


# From what is in an error, or in the name of a node of the graph, to what to write instead.
REMEDIES: dict[str, str] = {
    "OdeintAdjointMethod": "use `odeint` in place of `odeint_adjoint`",
    "SdeintAdjointMethod": "use `sdeint` in place of `sdeint_adjoint`",
    "RBFCovariance": "evaluate the kernel under `gpytorch.settings.trace_mode(True)`",
    "MaternCovariance": "evaluate the kernel under `gpytorch.settings.trace_mode(True)`",
    "CheckpointFunction": "use `checkpoint` with `use_reentrant=False`",
    "once_differentiable": "write the backward of that function in operations of torch, without `once_differentiable`",
    "roi_align": "crop with `F.grid_sample` in place of `roi_align`",
    "roi_pool": "crop with `F.grid_sample` in place of `roi_pool`",
    "deform_conv2d": "sample with `F.grid_sample` in place of `deform_conv2d`",
    "FlashAttn": "use `F.scaled_dot_product_attention` in place of flash attention",
    "_flash_attention_backward": "use `F.scaled_dot_product_attention` in place of flash attention",
    "FusedLayerNorm": "use `torch.nn.LayerNorm` in place of a fused one",
    "FusedRMSNorm": "use `torch.nn.RMSNorm` in place of a fused one",
    "FakeQuantize": "leave the rounding out: its gradient is not that of the loss",
    "_embedding_bag": "add up rows of `F.embedding`, without `max_norm` and `scale_grad_by_freq`",
    "_cdist_backward": "take norms of differences, `(a[:, None] - b).norm(dim=-1)`, in place of `cdist`",
    "_pdist_backward": "take norms of differences, `(a[i] - a[j]).norm(dim=-1)`, in place of `pdist`",
    "_ctc_loss_backward": "use `F.ctc_loss` in place of `torch.ctc_loss`",
    "_segment_reduce_backward": "use `index_add` or `scatter_reduce` in place of `segment_reduce`",
    "hardsigmoid_backward": "use `F.relu6(x + 3) / 6` in place of `hardsigmoid`",
    "_cudnn_rnn_backward": "set `torch.backends.cudnn.enabled = False`",
    "MaxUnpool": "unpool from windows that do not overlap, or with `scatter_add`",
    "SparseCoo": "put values that are learnt into a dense matrix by `index_put`",
    "SparseCompressed": "put values that are learnt into a dense matrix by `index_put`",
    "_sparse_softmax": "make the tensor dense by `to_dense`",
    "_sparse_log_softmax": "make the tensor dense by `to_dense`",
    "_sparse_sum": "make the tensor dense by `to_dense`",
    "_sparse_mm_reduce": "gather rows and use `scatter_reduce` in place of a reducing product",
    "linalg_ldl_factor": "use `torch.linalg.cholesky` or `torch.linalg.solve` in place of `ldl_factor`",
    "igamma": "keep the first argument of `igamma` constant",
    "zeta": "keep the first argument of `zeta` constant",
    "_standard_gamma": "draw samples of gamma, beta and Dirichlet distributions outside the loss",
    "_dirichlet_grad": "draw samples of gamma, beta and Dirichlet distributions outside the loss",
    "_sample_dirichlet": "draw samples of gamma, beta and Dirichlet distributions outside the loss",
}
