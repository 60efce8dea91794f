"""Which parameters of a model a Hessian is of, by globs of their names."""

import fnmatch
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pipeline.errors import ProblemError, nearest
from pipeline.planning.parameters import ParameterLayout, choose

_log = logging.getLogger(__name__)


def select(model: nn.Module, params: Sequence[str] | str | None, elsewhere: Sequence[str] = ()) -> ParameterLayout:
    """Lay out the parameters that globs choose among those that require grad.

    Args:
        model: that they are of.
        params: globs, `!glob` excludes; all that require grad when None.
        elsewhere: names of parameters that a loss has, named in errors.

    Returns:
        The layout.

    Raises:
        ProblemError: a glob matches nothing, or no real parameter is left.
    """
    named = dict(model.named_parameters())
    free = [name for name, p in named.items() if p.requires_grad]
    globs = ("*",) if params is None else (params,) if isinstance(params, str) else tuple(params)
    chosen = choose(free, globs, lambda glob: ProblemError(_nothing_matches(glob, named, free, elsewhere)))
    if not chosen:
        raise ProblemError(f"params: {list(globs)} leave no parameter, expected at least one")
    if wrong := [name for name in chosen if named[name].dtype.is_complex]:
        raise ProblemError(
            f"params: `{wrong[0]}` is complex; only real parameters have a Hessian here: leave it out (params=['!"
            f"{wrong[0]}']), freeze it, or hold it as a real parameter and take torch.view_as_complex of that"
        )
    layout = ParameterLayout.of([(name, named[name].shape) for name in chosen])
    if layout.size == 0:
        raise ProblemError("params: all selected parameters have no entries")
    return layout


def _nothing_matches(glob: str, named: Mapping[str, Any], free: Sequence[str], elsewhere: Sequence[str]) -> str:
    """Return why a glob matches nothing."""
    if found := fnmatch.filter(elsewhere, glob.removeprefix("!")):
        return (
            f"params: `{found[0]}` is a parameter of the loss, not of the model: make one module of both, and let the "
            "loss take what it returns"
        )
    if not named:
        return "params: the model has no parameters"
    if not free:
        return "params: no parameter of the model requires grad; call requires_grad_(True) on those that are wanted"
    if frozen := fnmatch.filter(named, glob.removeprefix("!")):
        return f"params: `{glob}` matches only frozen parameters ({frozen[0]}, ...); call requires_grad_(True) on them"
    return f"params: `{glob}` matches no parameter{nearest(glob.removeprefix('!'), free)}"


def require_ready(model: nn.Module) -> None:
    """Refuse weights that are not there yet, or that autograd cannot use.

    Args:
        model: as given.

    Raises:
        ProblemError: a lazy layer has not seen data, or a tensor was made under `torch.inference_mode`.
    """
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(p):
            raise ProblemError(f"model: `{name}` is not initialised yet (a lazy layer): call model(inputs) once before")
        if p.is_inference():
            raise ProblemError(f"model: `{name}` was made under torch.inference_mode(): make the model outside of it")


def constants_of(loss: Any, model: nn.Module) -> tuple[str, ...]:
    """Name the parameters that a loss has of its own, and warn that they are constants of the problem.

    Args:
        loss: a callable.
        model: whose parameters are none of these.

    Returns:
        Their names.
    """
    function = getattr(loss, "func", loss)  # of functools.partial
    if not isinstance(function, nn.Module):
        return ()
    ours = {id(p) for p in model.parameters()}
    found = tuple(name for name, p in function.named_parameters() if p.requires_grad and id(p) not in ours)
    if found:
        _log.warning(
            "loss: its own parameters (%s) are constants here; H is of the model's. To have them in it, make one "
            "module of model and loss",
            ", ".join(found),
        )
    return found


def check_finite(parameters: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that are not finite.

    Args:
        parameters: by name.
        source: named in the error.

    Raises:
        ProblemError: some are not.
    """
    for name, p in parameters.items():
        if p.is_floating_point() and not bool(p.isfinite().all()):
            count = int((~p.isfinite()).sum())
            raise ProblemError(f"{source}: {count} of {p.numel()} entries of `{name}` are NaN or infinite")
