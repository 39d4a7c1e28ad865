"""Which step a value belongs to, whatever the training loop looks like."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import nn

import torchprobe
from tests.setups.reference import gradients, l2, parameters
from torchprobe.testing import MemoryWriter

TOTAL = "overview/grad_norm"


class TwoParts(nn.Module):
    """Two parts that the user calls one at a time, as in a GAN: the model itself has no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(3, 4)
        self.critic = nn.Linear(4, 1)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def batch(seed: int = 0, size: int = 6, width: int = 4) -> torch.Tensor:
    return torch.randn(size, width, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, seed: int = 0, size: int = 6) -> torch.Tensor:
    return model(batch(seed, size)).square().mean()


def sgd(model: nn.Module, **options) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> float:
    """One plain iteration; the norm of all gradients that the optimizer used."""
    optimizer.zero_grad()
    loss_of(model, seed).backward()
    total = l2(*gradients(model).values())
    optimizer.step()
    return total


def steps(writer: MemoryWriter, tag: str) -> list[int]:
    return [step for step, _ in writer.scalars(tag)]


def values(writer: MemoryWriter, tag: str) -> list[float]:
    return [value for _, value in writer.scalars(tag)]


# ---- one optimizer


def test_a_plain_loop_counts_optimizer_steps_from_one():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    expected = []
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(4):
            expected.append((k + 1, train_step(model, optimizer, k)))
            assert session.step == k + 1
    assert writer.scalars(TOTAL) == [(k, pytest.approx(norm)) for k, norm in expected]
    assert steps(writer, "activation_mean/2") == [1, 2, 3, 4]
    assert steps(writer, "lr/SGD/group_0") == [1, 2, 3, 4]


def test_a_cadence_samples_step_one_and_then_every_nth():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=3):
        for k in range(7):
            train_step(model, optimizer, k)
    for tag in (TOTAL, "activation_mean/0", "param_norm/0.weight", "update_ratio/0.weight", "overview/loss"):
        assert steps(writer, tag) == [1, 3, 6], tag
    assert steps(writer, "lr/SGD/group_0") == [1, 2, 3, 4, 5, 6, 7]


def test_uneven_gradient_accumulation_is_one_step_with_the_accumulated_gradient():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    expected = []
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for micro_batches in (3, 1, 2):
            optimizer.zero_grad()
            for i in range(micro_batches):
                (loss_of(model, seed=i, size=2 + 3 * i) / micro_batches).backward()
            expected.append(gradients(model))
            optimizer.step()
        assert session.step == 3
    assert values(writer, "grad_norm/0.weight") == pytest.approx([l2(g["0.weight"]) for g in expected])
    assert values(writer, "grad_norm_layer/0") == pytest.approx([l2(g["0.weight"], g["0.bias"]) for g in expected])
    assert values(writer, "grad_mean_abs/2") == pytest.approx(
        [torch.cat([g["2.weight"].flatten(), g["2.bias"]]).abs().mean().item() for g in expected]
    )


def test_the_gradient_norm_is_the_one_after_clipping():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(2):
            optimizer.zero_grad()
            (100 * loss_of(model, k)).backward()
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25) > 0.25
            optimizer.step()
    assert values(writer, TOTAL) == pytest.approx([0.25, 0.25], rel=1e-4)


@pytest.mark.parametrize("made", ["before", "after"])
def test_an_optimizer_made_before_or_after_instrument_is_found(made):
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model) if made == "before" else None
    with torchprobe.instrument(model, writer=writer, every=1):
        optimizer = optimizer or sgd(model)
        for k in range(2):
            train_step(model, optimizer, k)
    assert steps(writer, TOTAL) == [1, 2]


def test_an_optimizer_of_another_model_is_not_the_clock():
    model, other = net(), net()
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1) as session:
        train_step(other, sgd(other))
        assert session.step == 0


def test_two_models_in_one_process_have_a_clock_and_values_of_their_own():
    models, writers = [net(), net()], [MemoryWriter(), MemoryWriter()]
    optimizers = [sgd(model) for model in models]
    expected: list[list[float]] = [[], []]
    sessions = [torchprobe.instrument(m, writer=w, every=1) for m, w in zip(models, writers, strict=True)]
    for which in (0, 1, 0, 0, 1):
        expected[which].append(train_step(models[which], optimizers[which], seed=len(expected[which])))
    assert [session.step for session in sessions] == [3, 2]
    for session in sessions:
        session.detach()
    assert [values(writer, TOTAL) for writer in writers] == [pytest.approx(e) for e in expected]
    assert [steps(writer, "lr/SGD/group_0") for writer in writers] == [[1, 2, 3], [1, 2]]


def test_one_optimizer_over_two_models_is_the_clock_of_both():
    first, second, writers = net(), net(), [MemoryWriter(), MemoryWriter()]
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    with (
        torchprobe.instrument(first, writer=writers[0], every=1) as one,
        torchprobe.instrument(second, writer=writers[1], every=1) as two,
    ):
        for _ in range(2):
            optimizer.zero_grad()
            (loss_of(first) + loss_of(second)).backward()
            expected = [l2(*gradients(model).values()) for model in (first, second)]
            optimizer.step()
        assert (one.step, two.step) == (2, 2)
    assert [writer.value(TOTAL, 2) for writer in writers] == pytest.approx(expected)


# ---- several optimizers


def test_two_optimizers_after_one_backward_are_one_step_from_the_first_iteration_on():
    model, writer = net(), MemoryWriter()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizers = [torch.optim.SGD(matrices, lr=0.1, momentum=0.9), torch.optim.AdamW(vectors, lr=1e-3)]
    expected, norms = [], []
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(3):
            model.zero_grad()
            loss_of(model, k).backward()
            expected.append(gradients(model))
            for optimizer in optimizers:
                optimizer.step()
            norms.append(l2(*parameters(model).values()))
            session.log_metrics({"k": k + 1})
            assert session.step == k + 1
    assert writer.scalars(TOTAL) == [(k + 1, pytest.approx(l2(*g.values()))) for k, g in enumerate(expected)]
    for name in expected[0]:
        assert values(writer, f"grad_norm/{name}") == pytest.approx([l2(g[name]) for g in expected])
        assert steps(writer, f"update_ratio/{name}") == [1, 2, 3]
    assert values(writer, "overview/param_norm") == pytest.approx(norms)
    assert steps(writer, "lr/SGD/group_0") == steps(writer, "lr/AdamW/group_0") == [1, 2, 3]
    assert writer.scalars("k") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_step_one_shows_both_optimizers_at_any_cadence():
    model, writer = net(), MemoryWriter()
    optimizers = [sgd(model[0]), sgd(model[2])]
    with torchprobe.instrument(model, writer=writer, every=100) as session:
        for k in range(3):
            model.zero_grad()
            loss_of(model, k).backward()
            if k == 0:
                expected = l2(*gradients(model).values())
            for optimizer in optimizers:
                optimizer.step()
        assert session.step == 3
    assert writer.scalars(TOTAL) == [(1, pytest.approx(expected))]
    assert steps(writer, "update_ratio/0.weight") == steps(writer, "update_ratio/2.weight") == [1]


def gan_iteration(model: TwoParts, critic, generator, session, n_critic: int = 1) -> dict[str, list[torch.Tensor]]:
    """An iteration of a GAN: what both used, in the order of use."""
    used: dict[str, list[torch.Tensor]] = {"critic": [], "generator": []}
    for _ in range(n_critic):
        critic.zero_grad()
        fake = model.generator(torch.randn(5, 3)).detach()
        (model.critic(fake).mean() - model.critic(torch.randn(5, 4)).mean()).backward()
        used["critic"].append(l2(*gradients(model.critic).values()))
        critic.step()
        session.log_metrics({"critic": len(used["critic"])}, prefix="loss")
    generator.zero_grad()
    (-model.critic(model.generator(torch.randn(5, 3))).mean()).backward()
    used["generator"].append(l2(*gradients(model.generator).values()))
    session.log_metrics({"generator": 1}, prefix="loss")
    generator.step()
    return used


def test_a_gan_iteration_is_one_step_from_the_first_on():
    model, writer = TwoParts(), MemoryWriter()
    critic = torch.optim.AdamW(model.critic.parameters())
    generator = torch.optim.AdamW(model.generator.parameters())
    used = []
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(3):
            used.append(gan_iteration(model, critic, generator, session))
            assert session.step == k + 1
    assert values(writer, "grad_norm_layer/critic") == pytest.approx([u["critic"][0] for u in used])
    assert values(writer, "grad_norm_layer/generator") == pytest.approx([u["generator"][0] for u in used])
    assert values(writer, TOTAL) == pytest.approx([math.hypot(u["critic"][0], u["generator"][0]) for u in used])
    for tag in ("lr/AdamW/group_0", "lr/AdamW_1/group_0", "loss/critic", "loss/generator"):
        assert steps(writer, tag) == [1, 2, 3], tag
    assert steps(writer, "activation_mean/generator") == steps(writer, "activation_mean/critic") == [1, 2, 3]


def test_five_critic_steps_to_a_generator_step_are_five_steps_an_iteration():
    model, writer = TwoParts(), MemoryWriter()
    critic = torch.optim.SGD(model.critic.parameters(), lr=0.1)
    generator = torch.optim.SGD(model.generator.parameters(), lr=0.1)
    critic_norms, generator_norms = [], []
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for _ in range(4):
            used = gan_iteration(model, critic, generator, session, n_critic=5)
            critic_norms += used["critic"]
            generator_norms += used["generator"]
        assert session.step == 20
    assert writer.scalars("grad_norm_layer/critic") == [(k + 1, pytest.approx(n)) for k, n in enumerate(critic_norms)]
    assert values(writer, "grad_norm_layer/generator") == pytest.approx(generator_norms)
    assert steps(writer, "lr/SGD/group_0") == list(range(1, 21))


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("old", ["deleted", "kept"])
def test_an_optimizer_replaced_midway_goes_on_counting(old, first):
    model, writer, keep = net(), MemoryWriter(), []
    optimizer = torch.optim.AdamW(model.parameters())
    expected = []
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        expected += [train_step(model, optimizer, k) for k in range(first)]
        if old == "kept":
            keep.append(optimizer)
        del optimizer
        gc.collect()
        optimizer = sgd(model)
        expected += [train_step(model, optimizer, k) for k in range(first, 15)]
        assert session.step == 15
    assert writer.scalars(TOTAL) == [(k + 1, pytest.approx(norm)) for k, norm in enumerate(expected)]
    assert steps(writer, "lr/AdamW/group_0") == list(range(1, first + 1))
    assert steps(writer, "lr/SGD/group_0") == list(range(first + 1, 16))


def test_validation_after_training_is_over_still_belongs_to_the_last_step():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(2):
            train_step(model, optimizer, k)
        del optimizer
        gc.collect()
        model.eval()
        for k in range(3):
            with torch.no_grad():
                model(batch(k))
        assert session.step == 2
    assert steps(writer, "val/activation_mean/0") == [2]


# ---- closures, subclasses, steps inside steps, steps that raise


def closure_for(model, optimizer, seen, seed=0):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, seed)
        loss.backward()
        seen.append(gradients(model))
        return loss

    return closure


def test_sgd_with_a_closure():
    model, writer, seen = net(), MemoryWriter(), []
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(3):
            optimizer.step(closure_for(model, optimizer, seen, k))
        assert session.step == 3
    assert writer.scalars(TOTAL) == [(k + 1, pytest.approx(l2(*g.values()))) for k, g in enumerate(seen)]
    assert steps(writer, "activation_mean/0") == steps(writer, "update_ratio/0.weight") == [1, 2, 3]


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_counts_a_step_for_all_its_evaluations_and_none_as_skipped(search):
    model, writer, last = net(), MemoryWriter(), []
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, lr=0.1, line_search_fn=search)
    with torchprobe.instrument(model, writer=writer, every=1, flush_every=1) as session:
        for k in range(3):
            seen: list[dict[str, torch.Tensor]] = []
            optimizer.step(closure_for(model, optimizer, seen, k))
            assert len(seen) > 1
            last.append(l2(*seen[-1].values()))
        assert session.step == 3
    assert writer.scalars(TOTAL) == [(k + 1, pytest.approx(norm)) for k, norm in enumerate(last)]
    assert steps(writer, "activation_mean/0") == steps(writer, "update_ratio/0.weight") == [1, 2, 3]
    assert values(writer, "overview/skipped_steps")[-1] == 0


class Parent(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        return super().step(closure)


class Child(Parent):
    def step(self, closure=None):
        return super().step(closure)


def test_a_step_that_calls_the_steps_of_its_parent_classes_is_one_step():
    model, writer = net(), MemoryWriter()
    for parent in (torch.optim.SGD, Parent):
        parent(model.parameters(), lr=0.1)  # making one is what hooks its class
    optimizer = Child(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        expected = [train_step(model, optimizer, k) for k in range(3)]
        assert session.step == 3
    assert values(writer, TOTAL) == pytest.approx(expected)


class Lookahead(torch.optim.Optimizer):
    """Steps another optimizer over the same parameters, then pulls the weights back half way."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([p for group in inner.param_groups for p in group["params"]], {"lr": 0.5})
        self.inner = inner

    def step(self, closure=None):
        slow = [p.detach().clone() for p in self.param_groups[0]["params"]]
        self.inner.step()
        with torch.no_grad():
            for p, old in zip(self.param_groups[0]["params"], slow, strict=True):
                p.lerp_(old, 0.5)


def test_an_optimizer_inside_another_ones_step_is_part_of_that_step():
    model, writer = net(), MemoryWriter()
    optimizer = Lookahead(sgd(model, lr=0.2))
    expected, ratios = [], []
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(3):
            before = parameters(model)["0.weight"]
            expected.append(train_step(model, optimizer, k))
            ratios.append(l2(parameters(model)["0.weight"] - before) / l2(before))
            assert session.step == k + 1
    assert values(writer, TOTAL) == pytest.approx(expected)
    assert values(writer, "update_ratio/0.weight") == pytest.approx(ratios, rel=1e-5)


class Fails(torch.optim.SGD):
    """Raises in the middle of a step when told to."""

    fail = False

    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        if self.fail:
            raise torch.OutOfMemoryError("out of memory")
        return super().step()


@pytest.mark.parametrize("with_closure", [False, True], ids=["plain", "closure"])
def test_a_step_that_raises_is_no_step_and_the_next_ones_are_right(with_closure):
    model, writer = net(), MemoryWriter()
    optimizer = Fails(model.parameters(), lr=0.1)
    expected = []
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k, fails in enumerate((False, True, True, False, False)):
            seen: list[dict[str, torch.Tensor]] = []
            closure = closure_for(model, optimizer, seen, k)
            optimizer.fail = fails
            if not with_closure:
                closure()
            try:
                optimizer.step(closure if with_closure else None)
            except torch.OutOfMemoryError:
                continue
            expected.append(l2(*seen[-1].values()))
        assert session.step == 3
    assert writer.scalars(TOTAL) == [(k + 1, pytest.approx(norm)) for k, norm in enumerate(expected)]
    assert steps(writer, "update_ratio/0.weight") == [1, 2, 3]


def test_the_same_batch_tried_again_after_a_step_that_raised():
    model, writer = net(), MemoryWriter()
    optimizer = Fails(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        loss_of(model).backward()
        expected = l2(*gradients(model).values())
        optimizer.fail = True
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
        optimizer.fail = False
        optimizer.step()
        assert session.step == 1
    assert writer.scalars(TOTAL) == [(1, pytest.approx(expected))]


# ---- more forward and backward passes than steps


def test_several_forward_passes_before_one_backward_are_one_step_from_the_first_on():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    expected = []
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(3):
            optimizer.zero_grad()
            pair = [model(batch(10 * k + i, size=2 + i)) for i in range(3)]
            expected.append(torch.cat(pair).double().mean().item())
            sum(out.square().mean() for out in pair).backward()
            optimizer.step()
            assert session.step == k + 1
    assert writer.scalars("activation_mean/2") == [(k + 1, pytest.approx(mean)) for k, mean in enumerate(expected)]
    assert len(writer.records) == 3


def test_a_perturbed_second_pass_as_in_sharpness_aware_minimisation_is_part_of_the_step():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    means, norms = [], []
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(3):
            outputs = [model(batch(k))]
            outputs[0].square().mean().backward()
            slopes = [p.grad.clone() for p in model.parameters()]
            with torch.no_grad():
                torch._foreach_add_(list(model.parameters()), slopes, alpha=0.05)
            optimizer.zero_grad()
            outputs.append(model(batch(k)))
            outputs[1].square().mean().backward()
            with torch.no_grad():
                torch._foreach_sub_(list(model.parameters()), slopes, alpha=0.05)
            norms.append(l2(*gradients(model).values()))
            means.append(torch.cat(outputs).double().mean().item())
            optimizer.step()
            optimizer.zero_grad()
        assert session.step == 3
    assert values(writer, TOTAL) == pytest.approx(norms)
    assert values(writer, "activation_mean/2") == pytest.approx(means)
    assert values(writer, "overview/skipped_steps") == [0]


def test_a_model_that_is_trained_in_eval_mode():
    model, writer = net().eval(), MemoryWriter()
    optimizer = sgd(model)
    expected, losses = [], []
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(3):
            optimizer.zero_grad()
            loss = loss_of(model, k)
            loss.backward()
            session.log_metrics({"before": k + 1})
            expected.append(l2(*gradients(model).values()))
            losses.append(loss.item())
            optimizer.step()
            session.log_metrics({"after": k + 1})
            assert session.step == k + 1
    assert values(writer, TOTAL) == pytest.approx(expected)
    assert writer.scalars("before") == writer.scalars("after") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert values(writer, "overview/loss") == pytest.approx(losses)


def test_weights_updated_by_hand_without_an_optimizer():
    model, writer = net(), MemoryWriter()
    losses = []
    with torchprobe.instrument(model, writer=writer, every=1, flush_every=1) as session:
        for k in range(3):
            loss = loss_of(model, k)
            loss.backward()
            losses.append(loss.item())
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None
        session.flush()
        assert session.step == 3
    assert writer.scalars("overview/loss") == [(k + 1, pytest.approx(loss)) for k, loss in enumerate(losses)]
    assert steps(writer, "activation_mean/0") == [1, 2, 3]
    assert values(writer, "overview/skipped_steps")[-1] == 0


@pytest.mark.parametrize("zero_grad", ["first", "before backward"])
def test_a_gradient_penalty_is_no_skipped_step(zero_grad):
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    expected = []
    with torchprobe.instrument(model, writer=writer, every=1, flush_every=1) as session:
        for k in range(3):
            if zero_grad == "first":
                optimizer.zero_grad()
            loss = loss_of(model, k)
            x = batch(k + 10).requires_grad_()
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            if zero_grad == "before backward":
                optimizer.zero_grad()
            (loss + slope.square().mean()).backward()
            expected.append(l2(*gradients(model).values()))
            optimizer.step()
        assert session.step == 3
    assert values(writer, TOTAL) == pytest.approx(expected)
    assert values(writer, "overview/skipped_steps")[-1] == 0
    assert steps(writer, "activation_mean/0") == steps(writer, "activation_grad_norm/0") == [1, 2, 3]
    assert steps(writer, "overview/loss") == [1, 2, 3]


@pytest.mark.parametrize("zero_grad", ["first", "before backward"])
def test_an_adversarial_input_search_is_no_skipped_step(zero_grad):
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1, flush_every=1) as session:
        for k in range(3):
            if zero_grad == "first":
                optimizer.zero_grad()
            x = batch(k).requires_grad_()
            for _ in range(2):
                (slope,) = torch.autograd.grad(model(x).square().mean(), x)
                x = (x + 0.1 * slope.sign()).detach().requires_grad_()
            loss = model(x).square().mean()
            if zero_grad == "before backward":
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert session.step == k + 1
    assert steps(writer, TOTAL) == steps(writer, "activation_mean/0") == [1, 2, 3]
    assert values(writer, "overview/skipped_steps")[-1] == 0


# ---- learning rates


def test_the_learning_rate_is_the_one_that_the_step_used():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(3):
            train_step(model, optimizer, k)
            scheduler.step()
    assert writer.scalars("lr/SGD/group_0") == [(1, 1.0), (2, 0.5), (3, 0.25)]


def test_a_learning_rate_that_is_a_tensor_changed_in_place():
    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(3):
            train_step(model, optimizer, k)
            scheduler.step()
    assert writer.scalars("lr/AdamW/group_0") == [(1, 0.5), (2, 0.25), (3, 0.125)]


def test_parameter_groups_and_a_second_optimizer_of_the_same_class_have_tags_of_their_own():
    model, writer = net(), MemoryWriter()
    first = torch.optim.AdamW(
        [{"params": model[0].weight}, {"params": model[0].bias, "lr": 0.25, "weight_decay": 0.0}], lr=0.5
    )
    second = torch.optim.AdamW(model[2].parameters(), lr=0.125)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(2):
            loss_of(model, k).backward()
            first.step()
            second.step()
            first.param_groups[0]["weight_decay"] = 0.5 * (k + 1)
    assert writer.scalars("lr/AdamW/group_0") == [(1, 0.5), (2, 0.5)]
    assert writer.scalars("lr/AdamW/group_1") == [(1, 0.25), (2, 0.25)]
    assert writer.scalars("lr/AdamW_1/group_0") == [(1, 0.125), (2, 0.125)]
    assert writer.scalars("weight_decay/AdamW/group_0") == [(1, 0.01), (2, 0.5)]
    assert writer.scalars("weight_decay/AdamW/group_1") == [(1, 0.0)]
    assert writer.scalars("momentum/AdamW/group_0") == [(1, 0.9)]


def test_the_label_of_a_living_optimizer_is_never_given_twice():
    model, writer = net(), MemoryWriter()
    weights, biases = ([p for p in model.parameters() if (p.dim() == 2) is matrix] for matrix in (True, False))
    first, second = torch.optim.AdamW(weights, lr=0.5), torch.optim.AdamW(biases, lr=0.25)
    with torchprobe.instrument(model, writer=writer, every=1):
        loss_of(model).backward()
        first.step()
        second.step()
        del first
        gc.collect()
        first = torch.optim.AdamW(weights, lr=0.125)
        loss_of(model).backward()
        second.step()
        first.step()
    assert writer.value("lr/AdamW/group_0") == 0.125
    assert values(writer, "lr/AdamW_1/group_0") == [0.25, 0.25]


# ---- the user's clock


def test_steps_by_hand_from_the_first_one():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        expected = []
        for k in range(3):
            expected.append(train_step(model, optimizer, k))
            session.log_metrics({"k": k + 1})
            session.next_step()
            assert session.step == k + 1
    assert writer.scalars("k") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert values(writer, TOTAL) == pytest.approx(expected)


def test_of_several_optimizer_steps_in_a_step_by_hand_the_last_counts():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        session.next_step()  # step 1 is empty
        last = []
        for k in range(2):
            totals = [train_step(model, optimizer, 3 * k + i) for i in range(3)]
            last.append(totals[-1])
            session.next_step()
        assert session.step == 3
    assert writer.scalars(TOTAL) == [(2, pytest.approx(last[0])), (3, pytest.approx(last[1]))]


def test_steps_by_hand_without_an_optimizer():
    model, writer = net().eval(), MemoryWriter()
    with torchprobe.instrument(model, writer=writer, every=1) as session, torch.no_grad():
        model(batch())
        session.next_step()  # that pass was step 1 already; from now on, a pass is none
        for k in range(2):
            for i in range(2):
                model(batch(2 * k + i))
            session.log_metrics({"k": k + 2})
            session.next_step()
        assert session.step == 3
    assert writer.scalars("k") == [(2, 2.0), (3, 3.0)]
    assert steps(writer, "val/activation_mean/0") == [1, 2, 3]


# ---- no optimizer in sight


@pytest.mark.parametrize(
    ("training", "grad", "prefix"),
    [(False, False, "val/"), (True, False, ""), (True, True, ""), (False, True, "val/")],
    ids=["eval, no_grad", "train, no_grad", "train, with gradients", "eval, with gradients"],
)
def test_in_pure_inference_forward_passes_are_the_clock(training, grad, prefix):
    model, writer = net().train(training), MemoryWriter()
    means = []
    with torchprobe.instrument(model, writer=writer, every=1) as session, torch.set_grad_enabled(grad):
        for k in range(4):
            means.append(model(batch(k)).double().mean().item())
            session.log_metrics({"k": k + 1})
        session.flush()
        assert session.step == 4
    assert writer.scalars(f"{prefix}activation_mean/2") == [(k + 1, pytest.approx(m)) for k, m in enumerate(means)]
    assert writer.scalars("k") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert not [tag for tag in writer.tags() if tag.startswith("activation" if prefix else "val/")]


def test_inference_is_sampled_at_the_cadence():
    model, writer = net().eval(), MemoryWriter()
    with torchprobe.instrument(model, writer=writer, every=3), torch.no_grad():
        for k in range(7):
            model(batch(k))
    assert steps(writer, "val/activation_mean/0") == [1, 3, 6]


# ---- validation


def validate(model: nn.Module, seed: int, batches: int = 2) -> float:
    """A validation pass; the mean of the first batch's logits."""
    model.eval()
    with torch.no_grad():
        means = [model(batch(seed + i)).double().mean().item() for i in range(batches)]
    model.train()
    return means[0]


def test_validation_after_step_k_carries_k_and_never_mixes_with_training():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    trained, validated = [], []
    model[2].register_forward_hook(lambda m, a, out: trained.append(out.double().mean().item()) if m.training else None)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(4):
            train_step(model, optimizer, k)
            if k % 2:
                validated.append(validate(model, seed=50 + k))
                session.log_metrics({"accuracy": k}, prefix="val")
            assert session.step == k + 1
    assert writer.scalars("val/activation_mean/2") == [
        (k, pytest.approx(v)) for k, v in zip((2, 4), validated, strict=True)
    ]
    assert writer.scalars("activation_mean/2") == [(k + 1, pytest.approx(v)) for k, v in enumerate(trained)]
    assert writer.scalars("val/accuracy") == [(2, 1.0), (4, 3.0)]
    assert not [tag for tag in writer.tags() if tag.startswith("val/activation_grad")]


def test_only_the_first_batch_of_a_validation_runs_module_hooks(traces):
    model = net()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1):
        train_step(model, optimizer)
        model.eval()
        hooks = []
        for k in range(3):
            with torch.no_grad():
                model(batch(k))
            hooks.append(sum("observe_output" in trace for trace in traces(model)))
    assert hooks[1:] == [0, 0]


@pytest.mark.parametrize("every", [1, 100])
def test_a_sanity_validation_before_training_is_no_step_of_it(every):
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=every) as session:
        before = validate(model, seed=7, batches=3)
        assert session.step == 0
        expected = train_step(model, optimizer)
        assert session.step == 1
        after = validate(model, seed=70)
        train_step(model, optimizer)
        assert session.step == 2
    assert writer.scalars(TOTAL)[0] == (1, pytest.approx(expected))
    for tag in ("activation_mean/0", "activation_grad_norm/0", "update_ratio/0.weight", "overview/loss"):
        assert steps(writer, tag)[0] == 1, tag
        assert len(steps(writer, tag)) == (2 if every == 1 else 1), tag
    assert steps(writer, "lr/SGD/group_0") == [1, 2]
    assert writer.scalars("val/activation_mean/2") == [(0, pytest.approx(before)), (1, pytest.approx(after))]


# ---- what the user logs


def test_metrics_logged_before_and_after_the_optimizers_step_carry_the_same_step():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(3):
            optimizer.zero_grad()
            loss = loss_of(model, k)
            session.log_metrics({"before_backward": k + 1})
            loss.backward()
            session.log_metrics({"before_step": k + 1})
            optimizer.step()
            session.log_metrics({"after_step": k + 1, "loss": loss}, prefix="train")
    for tag in ("before_backward", "before_step", "train/after_step"):
        assert writer.scalars(tag) == [(1, 1.0), (2, 2.0), (3, 3.0)], tag
    assert steps(writer, "train/loss") == [1, 2, 3]
    assert len(writer.records) == 3


def test_metrics_logged_after_a_flush_still_belong_to_the_step():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(2):
            train_step(model, optimizer, k)
            assert session.flush()
            assert steps(writer, TOTAL)[-1] == k + 1
            session.log_metrics({"late": k + 1})
    assert writer.scalars("late") == [(1, 1.0), (2, 2.0)]


def test_validation_after_a_flush_still_belongs_to_the_step():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(2):
            train_step(model, optimizer, k)
            session.flush()
            validate(model, seed=k)
    assert steps(writer, "val/activation_mean/0") == [1, 2]


def test_what_was_logged_in_an_iteration_without_a_step_comes_out_when_the_session_ends():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        train_step(model, optimizer)
        loss_of(model)
        session.log_metrics({"unfinished": 1.0})
    assert writer.scalars("unfinished") == [(2, 1.0)]
    assert steps(writer, "activation_mean/0") == [1]


def test_the_counts_of_a_run_shorter_than_a_flush_come_out_at_its_end():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(3):
            train_step(model, optimizer, k)
    assert writer.scalars("overview/skipped_steps") == writer.scalars("overview/dropped_records") == [(3, 0.0)]
