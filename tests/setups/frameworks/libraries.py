"""Libraries of models, and the loops that are usual with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.setups.frameworks.run import Run, loader, needed, rows


def walk(discrete: bool) -> Any:
    """An environment: what it shows is random, and its reward is what the action makes of it."""
    gymnasium = needed("gymnasium")
    import numpy as np

    class Walk(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (4,))
        action_space = gymnasium.spaces.Discrete(2) if discrete else gymnasium.spaces.Box(-1, 1, (2,))

        def reset(self, **options):
            self.random, self.turns = np.random.default_rng(0), 0
            return self.random.uniform(-1, 1, 4).astype("float32"), {}

        def step(self, action):
            self.turns += 1
            seen = self.random.uniform(-1, 1, 4).astype("float32")
            return seen, float(seen[0] * np.sum(action)), self.turns % 10 == 0, False, {}

    return Walk()


def stable_baselines(kind: str, discrete: bool, steps: int, **options: Any) -> Callable[[Run], None]:
    def train(run: Run) -> None:
        library = needed("stable_baselines3")
        agent = getattr(library, kind)(
            "MlpPolicy", walk(discrete), seed=3, device="cpu", policy_kwargs={"net_arch": [8]}, **options
        )
        run(agent.policy)
        agent.learn(steps)

    return train


def timm(run: Run) -> None:
    """A vision transformer, timm's own optimizer and average of weights."""
    library = needed("timm")
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3

    model = library.create_model(
        "vit_tiny_patch16_224", img_size=32, num_classes=3, embed_dim=24, depth=2, num_heads=2, drop_path_rate=0.1
    )
    run(model)
    optimizer, average = create_optimizer_v2(model, opt="lamb", lr=1e-2), ModelEmaV3(model)
    for _ in range(3):
        nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model)


def torchvision_detection(run: Run) -> None:
    """A model that takes targets and gives its losses by name."""
    detection = needed("torchvision.models.detection")
    model = run(detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
        targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}] * 2
        sum(model(images, targets).values()).backward()
        optimizer.step()
        optimizer.zero_grad()


def torch_geometric(run: Run) -> None:
    needed("torch_geometric")
    from torch_geometric.nn import GATConv, GCNConv, Sequential

    model = run(
        Sequential(
            "x, edge_index",
            [
                (GCNConv(8, 8), "x, edge_index -> x"),
                nn.ReLU(),
                (GATConv(8, 3, heads=2, concat=False), "x, edge_index -> x"),
            ],
        )
    )
    x, y = rows()
    edges = torch.randint(0, len(x), (2, 90))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x, edges)[:20], y[:20]).backward()
        optimizer.step()


def gpytorch_exact(run: Run) -> None:
    gpytorch = needed("gpytorch")
    x, y = rows(20)[0], rows(20)[0].sum(1)

    class Exact(gpytorch.models.ExactGP):
        def __init__(self) -> None:
            super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
            self.mean, self.kernel = gpytorch.means.ConstantMean(), gpytorch.kernels.RBFKernel()

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))

    by_evidence(gpytorch, run(Exact()), x, y)


def gpytorch_deep_kernel(run: Run) -> None:
    """A network whose output the kernel takes: its other parameters have their gradients before the network's."""
    gpytorch = needed("gpytorch")
    x, y = rows(20)[0], rows(20)[0].sum(1)

    class Deep(gpytorch.models.ExactGP):
        def __init__(self) -> None:
            super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
            self.mean, self.kernel = gpytorch.means.ConstantMean(), gpytorch.kernels.RBFKernel()
            self.features = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, x):
            z = self.features(x)
            return gpytorch.distributions.MultivariateNormal(self.mean(z), self.kernel(z))

    by_evidence(gpytorch, run(Deep()), x, y)


def by_evidence(gpytorch: Any, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    evidence = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (-evidence(model(x), y)).backward()
        optimizer.step()


def torchrl_ppo(run: Run) -> None:
    """The loss is a module that holds the actor and the critic, in containers that define ==."""
    objectives, tensordict = needed("torchrl.objectives"), needed("tensordict")
    from tensordict.nn import TensorDictModule
    from torchrl.modules import ProbabilisticActor, ValueOperator

    def mlp(out: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, out))

    actor = ProbabilisticActor(
        TensorDictModule(mlp(2), ["observation"], ["logits"]), in_keys=["logits"], return_log_prob=True,
        distribution_class=torch.distributions.Categorical,
    )  # fmt: skip
    loss = run(objectives.ClipPPOLoss(actor, ValueOperator(mlp(1), ["observation"])))
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    for _ in range(3):
        batch = tensordict.TensorDict({"observation": torch.randn(6, 4)}, [6])
        with torch.no_grad():
            batch = actor(batch)
        batch["advantage"], batch["value_target"] = torch.randn(6, 1), torch.randn(6, 1)
        out = loss(batch)
        (out["loss_objective"] + out["loss_critic"] + out["loss_entropy"]).backward()
        optimizer.step()
        optimizer.zero_grad()


def pyro_svi(run: Run) -> None:
    """One optimizer for each parameter."""
    pyro = needed("pyro")
    import pyro.distributions as dist
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoNormal
    from pyro.nn import PyroModule, PyroSample

    pyro.clear_param_store()

    class Regression(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = PyroModule[nn.Linear](8, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 8]).to_event(2))

        def forward(self, x, y=None):
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                return pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)

    model = Regression()
    guide = AutoNormal(model)
    x = rows()[0]
    guide(x, x.sum(1))
    run(guide)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=Trace_ELBO())
    for _ in range(3):
        svi.step(x, x.sum(1))


def diffusers(run: Run) -> None:
    library = needed("diffusers")
    model = library.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    run(model)
    schedule, optimizer = library.DDPMScheduler(50), torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        clean, noise, when = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.randint(0, 50, (4,))
        loss = nn.functional.mse_loss(model(schedule.add_noise(clean, noise, when), when).sample, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def blitz(run: Run) -> None:
    needed("blitz")
    from blitz.modules import BayesianLinear
    from blitz.utils import variational_estimator

    @variational_estimator
    class Bayesian(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = BayesianLinear(8, 8), BayesianLinear(8, 3)

        def forward(self, x):
            return self.last(self.first(x).relu())

    model = run(Bayesian())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for x, y in loader():
        optimizer.zero_grad()
        model.sample_elbo(inputs=x, labels=y, criterion=nn.CrossEntropyLoss(), sample_nbr=3).backward()
        optimizer.step()
