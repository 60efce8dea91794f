"""Why `autograd.grad(grads, flat_params[i:])` gives None, and what to write instead.

    python jobs/examples/why_none.py

The wish is good: H is symmetric, so of row i only the columns from i on are needed. Three ways are shown: the one that
fails, ten lines of plain torch, and this package.
"""

import torch
from torch import nn
from torch.autograd import grad
from torch.func import functional_call, jacrev
from torch.func import grad as func_grad

from pipeline import Problem, compute_hessian

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
x, y = torch.randn(20, 4, dtype=torch.float64), torch.randint(0, 3, (20,))
criterion = nn.CrossEntropyLoss()


def slicing_the_flat_vector() -> torch.Tensor | None:
    """The flat vector IS in the graph here; its slice is a new tensor that nothing was computed from."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).requires_grad_()
    pieces = flat.split([s.numel() for s in shapes.values()])
    params = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
    (gradient,) = grad(criterion(functional_call(model, params, (x,)), y), flat, create_graph=True)
    (part,) = grad(gradient[7], flat[7:], allow_unused=True)  # flat[7:] was made after the loss: not on its way
    return part


def ten_lines_of_torch() -> torch.Tensor:
    """Upper triangle of blocks: differentiate with respect to whole parameters, only those from the row's own on."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    names, bands = list(params), []
    for k, a in enumerate(names):

        def row_gradient(right: dict[str, torch.Tensor], a: str = a) -> torch.Tensor:
            def loss(theta_a: torch.Tensor) -> torch.Tensor:
                return criterion(functional_call(model, {**params, **right, a: theta_a}, (x,)), y)

            return func_grad(loss)(right[a]).reshape(-1)  # the inner pass is not vmapped: right on LayerNorm too

        blocks = jacrev(row_gradient)({name: params[name] for name in names[k:]})  # the pull-back stops there
        band = torch.cat([blocks[name].flatten(1) for name in names[k:]], dim=1)
        bands.append(nn.functional.pad(band, (sum(p.numel() for p in params.values()) - band.shape[1], 0)))
    upper = torch.cat(bands).triu()
    return upper + upper.triu(1).T


def this_package() -> torch.Tensor:
    """The same with tiles, chunks, Ray, a bucket and a proof."""
    return torch.from_numpy(compute_hessian(Problem(model, criterion, (x, y)), executor="serial").to_numpy())


if __name__ == "__main__":
    print("grad(gradient[7], flat[7:]) gives", slicing_the_flat_vector())
    difference = (ten_lines_of_torch() - this_package()).abs().max()
    print(f"ten lines of torch and this package differ by {float(difference):.1e}")
