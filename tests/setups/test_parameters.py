"""Gradients, parameters and updates of every kind of parameter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

import torchprobe
from tests.setups.loops import batch, net, one_step
from tests.setups.reference import gradients, l2, parameters, wide
from torchprobe.testing import MemoryWriter


class Holder(nn.Module):
    """One parameter of any kind; its loss is a weighted sum of magnitudes, so that the gradient is known."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(values)

    def forward(self) -> torch.Tensor:
        return self.w.abs().square().sum()


def test_norms_layers_means_and_totals_against_float64():
    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(3):
            before = parameters(model)
            used = one_step(model, optimizer, model(batch(k)).square().mean())
            after = parameters(model)
    moved = {name: l2(after[name] - before[name]) / l2(before[name]) for name in before}
    for name in before:
        assert writer.value(f"grad_norm/{name}") == pytest.approx(l2(used[name]))
        assert writer.value(f"param_norm/{name}") == pytest.approx(l2(after[name]))
        assert writer.value(f"update_ratio/{name}") == pytest.approx(moved[name], rel=1e-4)
    for layer in "02":
        own = torch.cat([used[f"{layer}.weight"].flatten(), used[f"{layer}.bias"]])
        assert writer.value(f"grad_norm_layer/{layer}") == pytest.approx(l2(own))
        assert writer.value(f"grad_mean_abs/{layer}") == pytest.approx(own.abs().mean().item())
    assert writer.value("overview/grad_norm") == pytest.approx(l2(*used.values()))
    assert writer.value("overview/param_norm") == pytest.approx(l2(*after.values()))
    ratios = sorted(moved.values())
    assert writer.value("overview/update_ratio") == pytest.approx((ratios[1] + ratios[2]) / 2, rel=1e-4)


@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "inside a wrapper"])
@pytest.mark.parametrize("at_the_end", [False, True], ids=["and trained on", "at the end"])
def test_weights_that_are_loaded_after_a_step_are_not_that_steps(wrapped, at_the_end):
    """As a search for the learning rate does, or the best weights at the end."""
    model, writer = net(), MemoryWriter()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    watched = swa_utils.AveragedModel(model) if wrapped else model
    if wrapped:
        watched.module = model
    after = []
    with torchprobe.instrument(watched, writer=writer, every=1):
        for k in range(2 if at_the_end else 3):
            one_step(model, optimizer, watched(batch(k)).square().mean())
            after.append(parameters(model))
            if k == 1:
                model.load_state_dict(start)
    for step, weights in enumerate(after, 1):
        assert writer.value("overview/param_norm", step) == pytest.approx(l2(*weights.values()), rel=1e-5)
    assert l2(*after[1].values()) != pytest.approx(l2(*start.values()), rel=1e-3)


@pytest.mark.parametrize("moved", ["never", "at every step", "at the end", "in the last validation"])
def test_weights_that_are_moved_by_hand_after_the_last_step_are_not_that_steps(moved, caplog):
    """An average that is copied over them; what clips or averages them after every step belongs to it."""
    model, writer, after = net(), MemoryWriter(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(1, 5):
            one_step(model, optimizer, model(batch(k)).square().mean())
            after.append(l2(*parameters(model).values()))
            with torch.no_grad():
                for p in model.parameters():
                    if moved == "at every step" or (moved != "never" and k == 4):
                        p.mul_(0.5)
                if moved == "at every step":
                    after[-1] = l2(*parameters(model).values())
                if moved == "in the last validation" and k == 4:
                    model.eval()(batch())
    right = dict(enumerate(after if moved in ("never", "at every step") else after[:3], 1))
    assert dict(writer.scalars("overview/param_norm")) == pytest.approx(right, rel=1e-5)
    assert {*dict(writer.scalars("overview/update_ratio"))} == {*right}
    assert caplog.text.count("are left out where weights were moved") == (len(right) < 4)


def test_what_is_clipped_after_the_steps_of_two_optimizers_belongs_to_them(caplog):
    """The head alone, as by a constraint on its largest norm, while the body's optimizer has stepped, too."""
    model, writer, after = net(), MemoryWriter(), []
    optimizers = [torch.optim.AdamW(part.parameters(), lr=0.01) for part in (model[0], model[2])]
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(1, 5):
            model.zero_grad()
            model(batch(k)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
            with torch.no_grad():
                model[2].weight.mul_(0.5)
            after.append(l2(model[2].weight))
    assert dict(writer.scalars("param_norm/2.weight")) == pytest.approx(dict(enumerate(after, 1)), rel=1e-5)
    assert "are left out" not in caplog.text


def test_the_parameter_norm_is_the_one_after_the_step():
    model, writer = Holder(torch.tensor([3.0, 4.0])), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)  # w - 0.25 * 2w = w / 2
    with torchprobe.instrument(model, writer=writer, every=1):
        one_step(model, optimizer, model())
    assert writer.scalars("param_norm/w") == [(1, 2.5)]
    assert writer.scalars("grad_norm/w") == [(1, 10.0)]
    assert writer.scalars("update_ratio/w") == [(1, 0.5)]


def test_histogram_counts_are_exact():
    model, writer = Holder(torch.tensor([0.0, 0.5, -2.0, 2.0, 30.0])), MemoryWriter()
    with torchprobe.instrument(model, writer=writer, every=1):
        one_step(model, torch.optim.SGD(model.parameters(), lr=0.0), model())
    assert writer.value("parameters/w").counts.sum() == 5
    found = writer.value("gradients/w")  # 1, 4, 4 and 60 on the axis of log10
    held = [found.counts[(found.edges[:-1] <= at) & (at < found.edges[1:])].sum() for at in map(math.log10, (1, 4, 60))]
    assert held == [1, 2, 1]
    assert found.counts.sum() == 4
    assert writer.value("gradients_zeros/w") == 1


KINDS = {
    "float64": torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64),
    "bfloat16": torch.tensor([1.0, -2.0, 0.5], dtype=torch.bfloat16),
    "float16": torch.tensor([1.0, -2.0, 0.5], dtype=torch.float16),
    "complex64": torch.tensor([1.0 + 2.0j, -0.5j]),
    "0-dim": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
    "not contiguous": torch.arange(12.0).reshape(3, 4).t(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_parameter(kind):
    model, writer = Holder(KINDS[kind].clone()), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        before = wide(model.w)
        used = one_step(model, optimizer, model())
        assert session.step == 1
    after, size = wide(model.w), before.numel()
    assert writer.value("grad_norm/w") == pytest.approx(l2(used["w"]))
    assert writer.value("param_norm/w") == pytest.approx(l2(after))
    if size:
        ratio = l2(after - before) / l2(before)
        assert writer.value("update_ratio/w") == pytest.approx(ratio, rel=1e-6)
        assert writer.value("overview/update_ratio") == writer.value("update_ratio/w")
    else:
        assert "update_ratio/w" not in writer.tags()
    elements = size * (2 if before.is_complex() else 1)
    assert writer.value("parameters/w").counts.sum() == elements
    assert writer.value("gradients/w").counts.sum() + writer.value("gradients_zeros/w") == elements
    assert not [tag for tag in writer.tags() if "nonfinite" in tag]


def test_kinds_of_parameters_side_by_side_in_one_model():
    model, writer = nn.ModuleDict({f"of {kind}": Holder(w.clone()) for kind, w in KINDS.items()}), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    with torchprobe.instrument(model, writer=writer, every=1):
        used = one_step(model, optimizer, sum(part().double() for part in model.values()))
    for name, gradient in used.items():
        assert writer.value(f"grad_norm/{name}") == pytest.approx(l2(gradient))
    assert writer.value("overview/grad_norm") == pytest.approx(l2(*used.values()))
    assert writer.value("overview/param_norm") == pytest.approx(l2(*parameters(model).values()))


def test_bf16_gradients_beyond_the_range_of_fp16_are_neither_inf_nor_zero():
    model, writer = Holder(torch.tensor([5e7, 1e-12], dtype=torch.bfloat16)), MemoryWriter()
    with torchprobe.instrument(model, writer=writer, every=1):
        used = one_step(model, torch.optim.SGD(model.parameters(), lr=0.1), model())
    assert writer.value("grad_norm/w") == pytest.approx(l2(used["w"]))
    counts = writer.value("gradients/w")
    assert counts.counts.sum() == 2
    assert counts.edges[counts.counts.nonzero()[0][0]] == pytest.approx(math.log10(2e-12), abs=0.4)


def test_the_sparse_gradient_of_an_embedding_counts_repeated_rows_summed():
    model, writer = nn.Sequential(nn.Embedding(50, 3, sparse=True), nn.Linear(3, 2)), MemoryWriter()
    sparse = torch.optim.SparseAdam(model[0].parameters(), lr=0.1)
    dense = torch.optim.SGD(model[1].parameters(), lr=0.1)
    ids = torch.tensor([4, 9, 4, 4])
    expected = []
    with torchprobe.instrument(model, writer=writer, every=1):
        for _ in range(2):
            model.zero_grad()
            nn.functional.mse_loss(model(ids), torch.ones(4, 2)).backward()
            assert model[0].weight.grad.is_sparse
            expected.append(l2(model[0].weight.grad.to_dense()))
            total = l2(*gradients(model).values())
            sparse.step()
            dense.step()
    assert writer.scalars("grad_norm/0.weight") == [(k + 1, pytest.approx(norm)) for k, norm in enumerate(expected)]
    assert writer.value("overview/grad_norm") == pytest.approx(total)
    assert writer.value("update_ratio/0.weight") > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_gradients_are_counted_by_module_and_norms_are_over_the_others(bad):
    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(2):
            optimizer.zero_grad()
            model(batch(k)).square().mean().backward()
            if k == 1:
                model[0].weight.grad[0, :3] = bad
                model[0].bias.grad[1] = bad
                used = {name: g[g.isfinite()] for name, g in gradients(model).items()}
            optimizer.step()
    assert writer.scalars("grad_nonfinite/0") == [(2, 4.0)]
    assert "grad_nonfinite/2" not in writer.tags()
    own = torch.cat([used["0.weight"], used["0.bias"]])
    assert writer.value("grad_norm/0.weight", 2) == pytest.approx(l2(used["0.weight"]))
    assert writer.value("grad_norm_layer/0", 2) == pytest.approx(l2(own))
    assert writer.value("grad_mean_abs/0", 2) == pytest.approx(own.abs().mean().item())
    assert writer.value("overview/grad_norm", 2) == pytest.approx(l2(*used.values()))
    assert writer.scalars("gradients_nonfinite/0.weight") == [(2, 3.0)]
    assert writer.value("gradients/0.weight", 2).counts.sum() + writer.value("gradients_zeros/0.weight", 2) == 17
    # The step wrote them into the parameters: 4 of 25 elements, of which the norm is over the others.
    assert writer.value("parameters_nonfinite/0.weight", 2) == 3
    assert writer.value("param_norm/0.weight", 2) == pytest.approx(
        l2(wide(model[0].weight)[wide(model[0].weight).isfinite()])
    )


def test_non_finite_activations_are_counted_and_left_out():
    model, writer = net(), MemoryWriter()
    x = batch()
    x[0, 0] = math.nan
    with torchprobe.instrument(model, writer=writer, every=1), torch.no_grad():
        out = wide(model(x))
    rest = out[out.isfinite()]
    assert writer.value("activation_nonfinite/2") == 2
    assert writer.value("activation_mean/2") == pytest.approx(rest.mean().item())
    assert writer.value("activation_max_abs/2") == pytest.approx(rest.abs().max().item())


@pytest.mark.parametrize("after", range(1, 5), ids="step {}".format)
@pytest.mark.parametrize("how", ["to", "load_state_dict"])
def test_torch_may_swap_the_parameters_of_a_watched_model(how, after):
    """As it does for tensor subclasses, and where the user asks for it: it raises where weak references are held."""
    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    right = []
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(6):
            optimizer.zero_grad()
            model(batch(k).to(model[0].weight.dtype)).square().mean().backward()
            right.append(l2(*gradients(model).values()))
            optimizer.step()
            with torch.no_grad():
                model(batch(k).to(model[0].weight.dtype))
            if k + 1 == after:
                swap(model, how)
        assert session.step == 6
    assert [value for _, value in writer.scalars("overview/grad_norm")] == pytest.approx(right)


def swap(model: nn.Module, how: str) -> None:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        if how == "to":
            model.to(torch.float64)
        else:
            model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
