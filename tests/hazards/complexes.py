"""Complex tensors: buffers, data, constants, frozen parameters; and parameters, which have no Hessian here."""

import torch
import torch.nn.functional as F
from torch import nn

from hazards.base import Fn, adding, call, labels, normal, supervised

add = adding("complex tensors")
X, Y = normal(7, 4), labels(7)
NAMED = r"`phase`.*complex|complex.*`phase`"


def rotation(*shape, seed=4):
    return torch.polar(torch.ones(*shape), normal(*shape, seed=seed))


WAVES, SIGNAL = rotation(7, 4), rotation(4)


def parts(z):
    return torch.cat([z.real, z.imag], -1)


def net(**more):
    return Fn(lambda m, x: m.b(parts(m.phase * torch.tanh(m.a(x)))), a=nn.Linear(4, 4), b=nn.Linear(8, 3), **more)


def attribute():
    """A plain attribute, multiplied as a matrix."""
    model = Fn(lambda m, x: m.b(parts(torch.tanh(m.a(x)).to(m.phase) @ m.phase)), a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    model.phase = rotation(4, 2)
    twin = Fn(model.function, a=nn.Linear(4, 4), b=nn.Linear(4, 3), phase=rotation(4, 2))
    return model, twin


def as_complex(m, x):
    """Weights that are stored as pairs of reals."""
    return m.b(parts(x.to(torch.view_as_complex(m.pairs)) @ torch.view_as_complex(m.pairs)))


def filtered(m, x):
    """A filter in frequencies, frozen, as an image operator is."""
    return m.b(torch.fft.irfft(torch.fft.rfft(torch.tanh(m.a(x))) * m.phase[:3], n=4))


def evolved(m, x):
    """A state of two levels evolves under a Hermitian matrix of real parameters."""
    field = torch.complex(m.field, torch.zeros_like(m.field))
    pauli = torch.stack(
        [torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0, -1j], [1j, 0]]), torch.tensor([[1, 0], [0, -1]])]
    )
    hamiltonian = torch.einsum("k,kij->ij", field, pauli.to(field)) + x[:, :1, None] * torch.eye(2).to(field)
    state = torch.linalg.matrix_exp(-1j * hamiltonian)[..., 0] * m.phase
    return m.b(state.abs().square())


def received(o, y):
    """Complex targets."""
    return (torch.complex(o[:, :1], o[:, 1:2]) - y).abs().square().mean()


def learnt(requires_grad=True, **options):
    model = net(phase=nn.Parameter(rotation(4), requires_grad=requires_grad))
    return supervised(model, nn.CrossEntropyLoss(), X, Y, **options)


def classified(model, x=X, **options):
    return supervised(model, nn.CrossEntropyLoss(), x, Y, **options)


def with_twin(model, twin):
    twin.load_state_dict(model.state_dict(), strict=False)
    return *classified(model), twin


def closure():
    """A constant of the loss."""
    constant = rotation(3)
    loss = lambda o, y: (o * constant).abs().sum(-1).mul(y + 1).mean() + (o @ constant.real).square().mean()
    whole = lambda m, b: (lambda o, z: (o * z).abs().sum(-1).mul(b[1] + 1).mean() + (o @ z.real).square().mean())(
        call(m, b[0]), constant.to(torch.complex128)
    )
    return nn.Linear(4, 3), whole, (X, Y), {"loss": loss, "data": (X, Y)}


real = lambda out=3: nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, out))
MODELS = {
    "buffer in a product": lambda: net(phase=SIGNAL),
    "weights of pairs": lambda: Fn(as_complex, pairs=nn.Parameter(normal(4, 2, 2)), b=nn.Linear(4, 3)),
    "filter that is frozen": lambda: Fn(
        filtered, a=nn.Linear(4, 4), b=nn.Linear(4, 3), phase=nn.Parameter(SIGNAL.clone(), requires_grad=False)
    ),
    "evolution of a state": lambda: Fn(evolved, field=nn.Parameter(normal(3)), b=nn.Linear(2, 3), phase=rotation(2)),
}
for name_, model_ in MODELS.items():
    add(f"complex: {name_}", lambda model=model_: classified(model()))
add("complex: attribute in a matrix product", lambda: with_twin(*attribute()))
add("complex: inputs", lambda: classified(Fn(lambda m, z: m.net(parts(z)), net=real()), WAVES))
add(
    "complex: inputs and a buffer, multiplied as matrices",
    lambda: classified(Fn(lambda m, z: m.net(parts(z @ m.mixing)), net=real(), mixing=rotation(4, 4, seed=6)), WAVES),
)
add("complex: targets", lambda: supervised(nn.Linear(4, 2), received, X, WAVES[:, :1]))
add("complex: constant of the loss", closure)
add("complex: parameter", learnt, NAMED)
add("complex: parameter that is chosen by name", lambda: learnt(params="phase"), NAMED)
add("complex: parameter that is left out", lambda: learnt(params=("*", "!phase")))
add("complex: parameter that is frozen", lambda: learnt(requires_grad=False))
add(
    "complex: linear layer",
    lambda: supervised(
        Fn(lambda m, z: m.phase(z).abs(), phase=nn.Linear(4, 3, dtype=torch.complex64)), F.cross_entropy, WAVES, Y
    ),
    r"phase\.(weight|bias)`.*complex|complex.*`phase\.(weight|bias)`",
)
