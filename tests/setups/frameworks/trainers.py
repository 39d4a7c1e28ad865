"""What runs a training loop, or a part of one, for its user."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.setups.frameworks.run import Run, language_model, loader, needed, net, rows, sentences


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


def peft_lora(run: Run) -> None:
    transformers, peft = needed("transformers"), needed("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.1)
    model = run(peft.get_peft_model(language_model(transformers), config))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for batch in DataLoader(sentences(), batch_size=8):
        model(**batch).loss.backward()
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


def func_api(run: Run) -> None:
    """Gradients of torch.func set by hand."""
    run.by_hand = True
    model = run(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in loader():
        parameters = dict(model.named_parameters())

        def loss(weights, x=x, y=y):
            return nn.functional.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)

        for name, gradient in torch.func.grad(loss)({k: v.detach() for k, v in parameters.items()}).items():
            parameters[name].grad = gradient
        optimizer.step()


def lightning_lbfgs(run: Run) -> None:
    """Several evaluations of the loss a step."""
    pl = needed("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch, _):
            return {"loss": nn.functional.cross_entropy(self.net(batch[0]), batch[1])}

        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    fit(pl, run(Module()), loader())


def opacus(run: Run) -> None:
    """Gradients of each example, clipped, with noise."""
    engine = needed("opacus").PrivacyEngine()
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, data = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader(), noise_multiplier=1.0, max_grad_norm=1.0
    )
    run(model)
    for x, y in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def sam(run: Run) -> None:
    """Two evaluations a step, the second one where the gradient of the first leads."""
    library = needed("pytorch_optimizer")
    model = run(net())
    optimizer = library.SAM(model.parameters(), base_optimizer=torch.optim.SGD, lr=0.1)
    for x, y in loader():
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.second_step(zero_grad=True)


def lookahead(run: Run) -> None:
    """An optimizer around another one."""
    library = needed("pytorch_optimizer")
    model = run(net())
    optimizer = library.Lookahead(library.RAdam(model.parameters(), lr=1e-2), k=2)
    for x, y in loader():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
