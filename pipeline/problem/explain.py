"""What the user's code raised, in one line: what was done, what came of it, where, and what to write instead."""

import sysconfig
import traceback
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from pipeline.errors import in_words
from pipeline.problem.written_out import REMEDIES

# By a part of the message: what helps. The first that fits is said.
_TYPES = "this package evaluates in float64: create tensors in the type of what they meet, as in x.new_zeros(...)"
_REMEDIES = {
    "same dtype": _TYPES,
    "scalar type": _TYPES,
    "Float did not match Double": _TYPES,
    "Inference tensors": "make the model and the data outside torch.inference_mode()",
    "can't call numpy()": "keep to torch operations: what leaves torch cannot be differentiated",
    "argument 'input'": "what is no plain tuple goes to the model whole: give (inputs, target), or an objective",
    "through the graph a second time": "something made of the parameters is kept from one evaluation to the next (by a "
    "cached_property?): make it anew in each",
    "Expected mat_a to be Float32": "grouped products know no float64: take another implementation of the experts "
    "(experts_implementation='eager' in transformers)",
    "mutate a captured Tensor": "it writes into a tensor that it keeps: make one in each call, or take engine=rows",
    "data-dependent": "compile nothing inside, or give the module that is not compiled",
}
_CALLS = "the calls are objective(call, batch), loss(output, target) and model(inputs): unpack a batch inside"
_TORCH, _HERE = Path(torch.__file__).parent, Path(__file__).parents[1]
_PYTHON = Path(sysconfig.get_path("stdlib"))


def explained(error: BaseException, model: nn.Module, doing: str) -> str:
    """Return what the user's code raised.

    Args:
        error: what was raised.
        model: in whose modules it may have been.
        doing: what this package was doing, as in "evaluated in float64 on 8 samples".

    Returns:
        One line.
    """
    advice = _advice(error, doing)
    remedy = f"; {advice}" if advice else ""
    return (
        f"model or loss: evaluating them raised {in_words(error)}{raising_module(model, error)}{raising_line(error)} "
        f"({doing}){remedy}"
    )


def _advice(error: BaseException, doing: str) -> str:
    """Say what helps, where that is known."""
    advice = next((advice for part, advice in (_REMEDIES | REMEDIES).items() if part in str(error)), "")
    if advice == _TYPES and "in float32" in doing:
        return "some of it is float64: take dtype=float64"
    if not advice and isinstance(error, TypeError) and "argument" in str(error) and _is_of_a_call(error):
        return _CALLS
    if not advice and isinstance(error, AssertionError) and "in float64" in doing:
        return "this package evaluates in float64 too, to prove what it computes: a check of types is to let it pass"
    return advice


def raising_module(model: nn.Module, error: BaseException) -> str:
    """Name the innermost module in whose code an error was raised, as in " in `1` (BatchNorm1d)"."""
    paths = {id(module): path for path, module in model.named_modules()}
    owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = [owner for owner in owners if isinstance(owner, nn.Module) and id(owner) in paths]
    return place(" in", paths[id(inside[-1])], inside[-1]) if inside else ""


def place(what: str, path: str, module: nn.Module) -> str:
    """Name a module by its path, as in " in `1` (BatchNorm1d)"."""
    return f"{what} `{path}` ({type(module).__name__})" if path else f"{what} the model ({type(module).__name__})"


def raising_line(error: BaseException) -> str:
    """Name the innermost line outside torch and this package, as in ", net.py line 31"; empty where there is none."""
    return _line(error.__traceback__)


def _is_of_a_call(error: BaseException) -> bool:
    """Whether a function could not even be called: nothing of it is in the trace, whose last is who called."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return _is_ours(Path(frame.f_code.co_filename))


def _line(trace: TracebackType | None) -> str:
    found = ""
    for frame, line in traceback.walk_tb(trace):
        path = Path(frame.f_code.co_filename)
        if not _is_ours(path) and not path.name.startswith("<string>"):
            found = f", {path.name} line {line}"
    return found


def _is_ours(path: Path) -> bool:
    """Whether a file is of torch, of Python or of this package, in which no user looks for their mistake."""
    in_python = path.is_relative_to(_PYTHON) and "site-packages" not in path.parts
    return path.is_relative_to(_TORCH) or path.is_relative_to(_HERE) or in_python
