"""Training frameworks: the one line alone, and the callbacks where people look for them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import torchprobe
from torchprobe.testing import MemoryWriter

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the frameworks warn about one another
    pytest.mark.timeout(120),
]


def batches(rows: int = 32) -> DataLoader:
    generator = torch.Generator().manual_seed(rows)
    x, y = torch.randn(rows, 8, generator=generator), torch.randint(0, 3, (rows,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


# ---- Lightning


def lightning_module(*, calls_itself: bool = True):
    pl = pytest.importorskip("pytorch_lightning", reason="needs pytorch-lightning")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch, _):
            loss = nn.functional.cross_entropy(self.call(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch, _):
            self.log("val_loss", nn.functional.cross_entropy(self.call(batch[0]), batch[1]))

        def call(self, x):
            return self(x) if calls_itself else self.net(x)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    if calls_itself:
        Module.forward = lambda self, x: self.net(x)
    torch.manual_seed(0)
    return Module()


def fit(module, callbacks=(), **options):
    import pytorch_lightning as pl

    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), **options,
    )  # fmt: skip
    torch.manual_seed(1)
    trainer.fit(module, batches(), batches(16))
    return trainer


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed", "accumulate_grad_batches": 3}])
@pytest.mark.parametrize("calls_itself", [True, False])
def test_one_line_is_enough_for_lightning(options, calls_itself):
    bare = lightning_module(calls_itself=calls_itself)
    fit(bare, **options)
    module, writer = lightning_module(calls_itself=calls_itself), MemoryWriter()
    with torchprobe.instrument(module, writer=writer, every=1) as session:
        trainer = fit(module, **options)
        assert session.step == trainer.global_step > 1
    assert_equal(weights(bare), weights(module))
    taken = list(range(1, trainer.global_step + 1))
    for tag in ("overview/loss", "activation_mean/net.0", "grad_norm/net.3.weight", "lr/AdamW/group_0"):
        assert [step for step, _ in writer.scalars(tag)] == taken, tag
    validated = [step for step, _ in writer.scalars("val/activation_mean/net.0")]
    assert validated == [0, trainer.global_step // 2, trainer.global_step]  # Lightning's sanity check is step 0


@pytest.mark.parametrize("how", ["norm", "value"])
def test_lightning_clips_and_the_norm_before_is_recorded(how):
    left, used = [], []

    class Norms(lightning_module().__class__):
        def on_after_backward(self):
            left.append(self.norm())

        def on_before_optimizer_step(self, optimizer):  # Lightning clips after it
            used.append(self.norm())

        def norm(self) -> float:
            return float(torch.cat([p.grad.double().flatten() for p in self.parameters()]).norm())

    module, writer = Norms(), MemoryWriter()
    with torchprobe.instrument(module, writer=writer, every=1):
        fit(module, gradient_clip_val=0.01, gradient_clip_algorithm=how)
    assert left == used
    assert [norm for _, norm in writer.scalars("overview/grad_norm_unclipped")] == pytest.approx(left, rel=1e-5)
    assert {share for _, share in writer.scalars("overview/clipped_fraction")} == {1.0}
    after = [norm for _, norm in writer.scalars("overview/grad_norm")]
    assert all(norm < 0.5 * before for norm, before in zip(after, left, strict=True))


def test_the_lightning_callback_records_what_the_module_logs(tmp_path):
    module, writer = lightning_module(), MemoryWriter()
    from torchprobe.integrations.lightning import TorchProbeCallback

    callback = TorchProbeCallback(writer=writer, every=1)
    trainer = fit(module, [callback])
    assert callback.session is not None
    assert not callback.session.attached
    assert [step for step, _ in writer.scalars("train_loss")] == list(range(1, trainer.global_step + 1))
    assert dict(writer.scalars("train_loss"))[8] == pytest.approx(dict(writer.scalars("overview/loss"))[8])
    assert [step for step, _ in writer.scalars("val_loss")] == [4, 8]


def test_the_lightning_callback_lets_go_after_an_exception(traces, tmp_path):
    module = lightning_module()
    from torchprobe.integrations.lightning import TorchProbeCallback

    module.validation_step = lambda *_: 1 / 0
    callback = TorchProbeCallback()
    with pytest.raises(ZeroDivisionError):
        fit(module, [callback], default_root_dir=tmp_path, num_sanity_val_steps=0)
    assert not callback.session.attached
    assert not traces(module)
    assert list((tmp_path / "torchprobe").glob("events*"))


# ---- HuggingFace


class Sentences(Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 50, (12,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def trainer_of(tmp_path, callbacks=(), **options):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("accelerate", reason="needs accelerate")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, num_train_epochs=2, report_to=[], logging_steps=2,
        eval_strategy="epoch", use_cpu=True, save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    return transformers.Trainer(
        transformers.GPT2LMHeadModel(config), arguments, train_dataset=Sentences(), eval_dataset=Sentences(),
        callbacks=list(callbacks),
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"bf16": True, "gradient_accumulation_steps": 4}])
def test_one_line_is_enough_for_the_huggingface_trainer(options, tmp_path):
    bare = trainer_of(tmp_path, **options)
    bare.train()
    trainer, writer = trainer_of(tmp_path, **options), MemoryWriter()
    with torchprobe.instrument(trainer.model, writer=writer, every=1) as session:
        trainer.train()
        assert session.step == trainer.state.global_step > 1
    assert_equal(weights(bare.model), weights(trainer.model))
    taken = list(range(1, trainer.state.global_step + 1))
    for tag in ("overview/loss", "attention_entropy/transformer.h.1.attn", "grad_norm/transformer.ln_f.bias"):
        assert [step for step, _ in writer.scalars(tag)] == taken, tag
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]  # means over two steps
    seen = dict(writer.scalars("overview/loss"))
    for entry in logged:
        step = entry["step"]
        assert (seen[step - 1] + seen[step]) / 2 == pytest.approx(entry["loss"], rel=1e-3)


def test_the_huggingface_callback_records_what_the_trainer_logs(tmp_path):
    writer = MemoryWriter()
    pytest.importorskip("transformers", reason="needs transformers")
    from torchprobe.integrations.huggingface import TorchProbeCallback

    callback = TorchProbeCallback(writer=writer, every=1)
    trainer = trainer_of(tmp_path, [callback])
    trainer.train()
    assert callback.session is not None
    assert not callback.session.attached
    logged = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert writer.scalars("train/loss") == [(step, pytest.approx(loss)) for step, loss in logged]
    assert [step for step, _ in writer.scalars("val/loss")] == [6, 12]


# ---- accelerate


def test_accelerate_clips_where_gradients_are_complete_and_the_norm_before_is_recorded():
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, data = net(), batches()
    model, optimizer, data = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2), data)
    writer, left = MemoryWriter(), []
    with torchprobe.instrument(model, writer=writer, every=1):
        for x, y in data:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    left.append(float(torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm()))
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
    assert [norm for _, norm in writer.scalars("overview/grad_norm_unclipped")] == pytest.approx(left, rel=1e-5)
    assert writer.scalars("overview/clipped_fraction") == [(1, 1.0), (2, 1.0)]


@pytest.mark.parametrize("when", ["before", "after"])
def test_one_line_is_enough_for_accelerate(when):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

    def train(writer: MemoryWriter | None) -> nn.Module:
        torch.manual_seed(0)
        plain = net()
        optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
        if writer and when == "before":
            torchprobe.instrument(plain, writer=writer, every=1)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, optimizer, data = accelerator.prepare(plain, optimizer, batches())
        if writer and when == "after":
            torchprobe.instrument(model, writer=writer, every=1)
        for x, y in data:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
        return plain

    writer = MemoryWriter()
    bare, model = train(None), train(writer)
    session = torchprobe.session_of(model)
    session.detach()
    assert_equal(weights(bare), weights(model))
    assert session.step == 2
    assert writer.scalars("overview/grad_norm") == [(1, pytest.approx(0.1, 1e-3)), (2, pytest.approx(0.1, 1e-3))]
