"""Models of libraries that people really use, by configuration: right in float64, close in float32."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from oracle import block_error, dense_hessian

from field.cases import CASES
from pipeline import Problem, compute_hessian, load_checkpoint

EXAMPLES = Path(__file__).parents[2] / "jobs" / "examples"
NEEDS = {"physics": [], "graph": [], "hugging_face": ["transformers"], "lora": ["transformers", "peft"]}

pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.full("once more"))])
@pytest.mark.parametrize(("library", "make"), [(name, make) for name, made in CASES.items() for make in made])
def test_right(library, make, dtype):
    pytest.importorskip(library)
    case = make()
    H = compute_hessian(case.problem, executor="serial", dtype=dtype)
    # The oracle leaves what is written as float32 as it is.
    limit = 1e-3 if dtype == "float32" else 1e-5 if make.__name__ == "llama" else 1e-10
    with default_type(torch.float64):  # the oracle evaluates models that write no type in float64
        truth = case.truth()
    assert block_error(H.to_numpy(), truth, H.parameters, ulps=16 if dtype == "float64" else 1e9) < limit


class default_type:  # noqa: N801
    def __init__(self, dtype):
        self.dtype = dtype

    def __enter__(self):
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_):
        torch.set_default_dtype(self.before)


def gaussian_process(gpytorch, kernel):
    torch.manual_seed(0)
    x = torch.linspace(0, 1, 8)[:, None]
    y = torch.sin(6 * x[:, 0])

    class Process(gpytorch.models.ExactGP):
        def __init__(self, likelihood):
            super().__init__(x, y, likelihood)
            self.mean_module = gpytorch.means.ConstantMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(kernel)

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    model = Process(likelihood).train()
    marginal = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    return Problem(model, lambda out, y: -marginal(out, y), (x, y), separable=False)


@pytest.mark.parametrize("kernel", ["RBFKernel", "MaternKernel"])
def test_gaussian_processes_by_differences(kernel):
    """Double backward of these kernels is wrong by more than all of it; traced, the plain formula is right."""
    gpytorch = pytest.importorskip("gpytorch")
    found = compute_hessian(gaussian_process(gpytorch, getattr(gpytorch.kernels, kernel)()), executor="serial")
    assert set(found.manifest.engines.values()) == {"differences"}
    assert "has a backward of its own" in " ".join(found.manifest.preflight.contexts)
    with gpytorch.settings.trace_mode(True):
        plain = gaussian_process(gpytorch, getattr(gpytorch.kernels, kernel)())
        truth = compute_hessian(plain, executor="serial", dtype="float64")
    assert "differences" not in truth.manifest.engines.values()
    assert np.abs(found.to_numpy() - truth.to_numpy()).max() < 1e-6 * np.abs(truth.to_numpy()).max()


def test_vision_transformer():
    """Its package asks for torchvision, which does not fit every build of torch."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    x, y, loss = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]), torch.nn.CrossEntropyLoss()
    problem = Problem(model, loss, (x, y), params=["head.*", "norm.*"])
    H = compute_hessian(problem, executor="serial", dtype="float64")
    truth = dense_hessian(model, lambda m, b: loss(m(b[0]), b[1]), (x, y), H.parameters.names)
    assert block_error(H.to_numpy(), truth, H.parameters) < 1e-10


def test_a_checkpoint_of_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"width": 4})
            self.model = zoo.tanh_net()

        def training_step(self, batch, _):
            return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

    x, y = zoo.data()
    module, path = Module(), tmp_path / "epoch.ckpt"
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 7))
    trainer.save_checkpoint(path)
    problem = Problem(zoo.tanh_net(), torch.nn.CrossEntropyLoss(), (x, y))
    H = compute_hessian(load_checkpoint(problem, str(path), "state_dict.model"), executor="serial", dtype="float64")
    truth = dense_hessian(module.model, lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1]), (x, y))
    assert block_error(H.to_numpy(), truth, H.parameters) < 1e-10


SLOW = pytest.mark.full("imports for seconds")


@pytest.mark.parametrize("name", [n if n == "physics" else pytest.param(n, marks=SLOW) for n in NEEDS])
def test_examples_run(name):
    for library in NEEDS[name]:
        pytest.importorskip(library)
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 40
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False, cwd=EXAMPLES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
