"""Training frameworks, each in a few lines, and what their steps are, as their own calls of backward and step say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, TensorDataset

import torchprobe
from tests.setups.reference import wide
from torchprobe.testing import MemoryWriter


@dataclass
class Step:
    """What one step of the bare run was: the sum of what backward was called on, and the gradients that were used."""

    loss: float | None = None
    gradients: dict[Tensor, Tensor] = field(default_factory=dict)


class Run:
    """One run of a framework. Call it with the model before training begins."""

    def __init__(self, watched: bool, tmp: Any) -> None:
        self.tmp = tmp
        self.by_hand = False  # whether gradients come without a call of backward
        self.writer = MemoryWriter()
        self.steps: list[Step] = []
        self._watched = watched
        self._stepped = True
        torch.manual_seed(0)

    def __call__(self, model: Any) -> Any:
        self.model: nn.Module = model
        if self._watched:
            self.session = torchprobe.instrument(model, writer=self.writer, every=1)
        return model

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Of the bare run: every backward pass and optimizer step, as they are called."""
        original = torch.autograd.backward

        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            self._backward(tensors)
            original(tensors, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
            patch.setattr(torch.autograd, "backward", backward)
            stack.callback(register_optimizer_step_pre_hook(self._before_step).remove)
            stack.callback(register_optimizer_step_post_hook(self._after_step).remove)
            yield

    def _backward(self, tensors: Tensor | tuple[Tensor, ...]) -> None:
        roots = [root for root in ([tensors] if isinstance(tensors, Tensor) else tensors) if self._reached_from(root)]
        if roots and self._stepped:
            self.steps.append(Step())
            self._stepped = False
        if roots and not any(p.grad.any() for p in self.model.parameters() if p.grad is not None):
            self.steps[-1].loss = None  # what came before was zeroed
        for root in roots:
            self.steps[-1].loss = (self.steps[-1].loss or 0.0) + root.double().item()

    def _reached_from(self, root: Tensor) -> bool:
        mine, seen, left = set(self.model.parameters()), {None}, [root.grad_fn]
        while left:
            node = left.pop()
            if node in seen:
                continue
            seen.add(node)
            if getattr(node, "variable", None) in mine:
                return True
            left += [following for following, _ in node.next_functions]
        return False

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._closure(args, kwargs):  # some optimizers change gradients while they step
            self._use(optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._closure(args, kwargs):
            self._use(optimizer)

    @staticmethod
    def _closure(args: Any, kwargs: Any) -> bool:
        return any(map(callable, [*args[1:], *kwargs.values()]))

    def _use(self, optimizer: Optimizer) -> None:
        mine = set(self.model.parameters())
        held = [p for group in optimizer.param_groups for p in group["params"] if p in mine and p.grad is not None]
        if held:
            if self.by_hand:
                self.steps.append(Step())
            self.steps[-1].gradients |= {p: wide(p.grad) for p in held}
            self._stepped = True


def trained(train: Callable[[Run], None], tmp: Any, watched: bool) -> tuple[Run, list[Tensor], Tensor]:
    """The run, its weights at the end, and the random state."""
    run = Run(watched, tmp)
    with nullcontext() if watched else run.measuring():
        train(run)
    weights, random_state = [p.detach().clone() for p in run.model.parameters()], torch.get_rng_state()
    if watched:
        run.session.detach()
    return run, weights, random_state


def needed(name: str) -> Any:
    """A module, or the test is skipped: also where one is there that was built for another torch."""
    try:
        return import_module(name)
    except Exception as reason:
        pytest.skip(f"needs {name}: {reason}")


# ---- small things to train


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))


def rows(count: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 8, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(*rows()), batch_size=8)


def language_model(transformers: Any) -> nn.Module:
    torch.manual_seed(1)
    options = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**options, bos_token_id=0, eos_token_id=0))


def sentences(count: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 50, (count, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


# ---- frameworks


def plain(run: Run) -> None:
    model = run(net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for x, y in loader():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def transformers_trainer(run: Run) -> None:
    """Two micro-batches a step; clips by itself."""
    transformers = needed("transformers")
    needed("accelerate")
    arguments = transformers.TrainingArguments(
        str(run.tmp), per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=2, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(language_model(transformers), arguments, train_dataset=sentences())
    run(trainer.model)
    trainer.train()


def transformers_adafactor(run: Run) -> None:
    transformers = needed("transformers")
    needed("accelerate")
    arguments = transformers.TrainingArguments(
        str(run.tmp), per_device_train_batch_size=4, max_steps=3, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, optim="adafactor", bf16=True, gradient_checkpointing=True, label_smoothing_factor=0.1,
    )  # fmt: skip
    trainer = transformers.Trainer(language_model(transformers), arguments, train_dataset=sentences())
    run(trainer.model)
    trainer.train()


def accelerate(run: Run) -> None:
    accelerator = needed("accelerate").Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = run(net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, data = accelerator.prepare(model, optimizer, loader())
    for x, y in data:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()


def lightning_trainer(run: Run) -> None:
    pl = needed("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, _):
            self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    fit(pl, run(Module()), loader(), accumulate_grad_batches=2, gradient_clip_val=0.5)


def lightning_manual(run: Run) -> None:
    """Two optimizers, one pass each."""
    pl = needed("pytorch_lightning")

    class Gan(pl.LightningModule):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.generator, self.critic = nn.Linear(4, 8), nn.Linear(8, 1)

        def training_step(self, batch, _):
            one, other = self.optimizers()
            self.toggle_optimizer(one)
            fake = self.generator(torch.randn(len(batch[0]), 4))
            self.turn(one, nn.functional.softplus(-self.critic(fake)).mean())
            self.untoggle_optimizer(one)
            self.toggle_optimizer(other)
            real, fake = self.critic(batch[0]), self.critic(self.generator(torch.randn(8, 4)).detach())
            self.turn(other, (nn.functional.softplus(-real) + nn.functional.softplus(fake)).mean())
            self.untoggle_optimizer(other)

        def turn(self, optimizer, loss):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.Adam(part.parameters(), lr=1e-2) for part in (self.generator, self.critic)]

    fit(pl, run(Gan()), loader())


def fit(pl: Any, module: nn.Module, *data: Any, **options: Any) -> None:
    pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    ).fit(module, *data)  # fmt: skip


def fabric(run: Run) -> None:
    fabric = needed("lightning_fabric").Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model = net()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    run(model)
    for x, y in fabric.setup_dataloaders(loader()):
        fabric.backward(nn.functional.cross_entropy(model(x), y))
        fabric.clip_gradients(model, optimizer, max_norm=0.5)
        optimizer.step()
        optimizer.zero_grad()


class _Walk:
    """Where everything that Stable-Baselines3 asks of an environment is."""

    def __new__(cls, discrete: bool) -> Any:
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
            "MlpPolicy", _Walk(discrete), seed=3, device="cpu", policy_kwargs={"net_arch": [8]}, **options
        )
        run(agent.policy)
        agent.learn(steps)

    return train


def peft_lora(run: Run) -> None:
    transformers, peft = needed("transformers"), needed("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.1)
    model = run(peft.get_peft_model(language_model(transformers), config))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for batch in DataLoader(sentences(), batch_size=8):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


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


def skorch(run: Run) -> None:
    library = needed("skorch")
    classifier = library.NeuralNetClassifier(
        net(), criterion=nn.CrossEntropyLoss, optimizer=torch.optim.SGD, lr=0.1, max_epochs=2, batch_size=8, verbose=0
    )
    classifier.initialize()
    run(classifier.module_)
    x, y = rows()
    classifier.partial_fit(x.numpy(), y.numpy())


def ignite(run: Run) -> None:
    engine = needed("ignite.engine")
    model = run(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = nn.CrossEntropyLoss()
    trainer = engine.create_supervised_trainer(model, optimizer, loss, gradient_accumulation_steps=2)
    evaluator = engine.create_supervised_evaluator(model)
    trainer.add_event_handler(engine.Events.EPOCH_COMPLETED, lambda: evaluator.run(loader()))
    trainer.run(loader(), max_epochs=2)


def gpytorch_exact(run: Run) -> None:
    gpytorch = needed("gpytorch")
    x, y = rows(20)[0], rows(20)[0].sum(1)

    class Exact(gpytorch.models.ExactGP):
        def __init__(self) -> None:
            super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
            self.mean, self.kernel = gpytorch.means.ConstantMean(), gpytorch.kernels.RBFKernel()

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))

    model = run(Exact())
    evidence = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (-evidence(model(x), y)).backward()
        optimizer.step()


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


def schedulefree(run: Run) -> None:
    library = needed("schedulefree")
    model = run(net())
    optimizer = library.AdamWScheduleFree(model.parameters(), lr=1e-2)
    for x, y in loader():
        model.train()
        optimizer.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        model.eval()
        optimizer.eval()
        with torch.no_grad():
            model(x)


def higher(run: Run) -> None:
    """MAML: inner steps on functional copies, the outer step on the model's own weights."""
    library = needed("higher")
    model = run(net())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for x, y in loader():
        optimizer.zero_grad()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        with library.innerloop_ctx(model, inner, copy_initial_weights=False) as (copy, step):
            step.step(nn.functional.cross_entropy(copy(x[:4]), y[:4]))
            nn.functional.cross_entropy(copy(x[4:]), y[4:]).backward()
        optimizer.step()


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


def func_api(run: Run) -> None:
    """Gradients of torch.func set by hand."""
    run.by_hand = True
    model = run(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in loader():
        parameters = dict(model.named_parameters())
        loss = lambda weights: nn.functional.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)
        for name, gradient in torch.func.grad(loss)({k: v.detach() for k, v in parameters.items()}).items():
            parameters[name].grad = gradient
        optimizer.step()


FRAMEWORKS: dict[str, Callable[[Run], None]] = {
    "no framework": plain,
    "transformers.Trainer": transformers_trainer,
    "transformers.Trainer, Adafactor": transformers_adafactor,
    "accelerate": accelerate,
    "Lightning": lightning_trainer,
    "Lightning, manual optimization": lightning_manual,
    "Lightning Fabric": fabric,
    "Stable-Baselines3, PPO": stable_baselines("PPO", True, 32, n_steps=16, batch_size=8, n_epochs=2),
    "Stable-Baselines3, A2C": stable_baselines("A2C", True, 20),
    "Stable-Baselines3, DQN": stable_baselines(
        "DQN", True, 40, learning_starts=10, batch_size=8, target_update_interval=10
    ),
    "Stable-Baselines3, SAC": stable_baselines("SAC", False, 16, learning_starts=10, batch_size=8),
    "Stable-Baselines3, TD3": stable_baselines("TD3", False, 16, learning_starts=10, batch_size=8),
    "PEFT, LoRA": peft_lora,
    "timm": timm,
    "torchvision, detection": torchvision_detection,
    "PyTorch Geometric": torch_geometric,
    "skorch": skorch,
    "Ignite": ignite,
    "GPyTorch": gpytorch_exact,
    "Pyro, SVI": pyro_svi,
    "diffusers": diffusers,
    "Schedule-Free": schedulefree,
    "higher, MAML": higher,
    "BLiTZ": blitz,
    "torch.func": func_api,
}
