"""Which step validation and logged values belong to."""

from __future__ import annotations

import math

import pytest
import torch

import torchprobe
from tests.setups.loops import TOTAL, batch, loss_of, net, sgd, steps, train_step, validate
from torchprobe.testing import MemoryWriter

# ---- validation


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
    for tag in ("activation_mean/0", "activation_grad_norm/0", "update_ratio/0.weight"):
        assert steps(writer, tag)[0] == 1, tag
        assert len(steps(writer, tag)) == (2 if every == 1 else 1), tag
    assert steps(writer, "lr/SGD/group_0") == steps(writer, "overview/loss") == [1, 2]
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


def test_validation_between_micro_batches_belongs_to_the_step_before_and_never_mixes_with_that_of_the_next():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1, rules=[]):
        between, after = [], []
        for k in range(3):
            loss_of(model, k).backward()
            between.append(validate(model, seed=50 + k))
            loss_of(model, 10 + k).backward()
            optimizer.step()
            optimizer.zero_grad()
            after += [validate(model, seed=60 + k)] if k == 1 else []
    expected = {0: between[0], 1: between[1], 2: after[0]}  # step 2 has had its own when the next micro-batches come
    assert dict(writer.scalars("val/activation_mean/2")) == pytest.approx(expected)
    assert len(writer.scalars("val/activation_mean/2")) == len(expected)


@pytest.mark.parametrize("validates", [False, True])
def test_passes_in_evaluation_mode_that_one_backward_pass_runs_through_are_training_all_of_them(validates):
    """As of a siamese net whose normalisation is frozen; a pass that no backward pass runs through is none."""
    model, writer, trained, validated = net().eval(), MemoryWriter(), [], []
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1, rules=[]):
        for k in range(4):
            if validates:
                validated.append(model(batch(90 + k)).double().mean().item())
            pair = model(batch(2 * k)), model(batch(2 * k + 1))
            trained.append(torch.cat(pair).double().mean().item())
            (pair[0] - 2 * pair[1]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert dict(writer.scalars("activation_mean/2")) == pytest.approx(dict(enumerate(trained, 1)), rel=1e-5)
    found = dict(writer.scalars("val/activation_mean/2")) if "val/activation_mean/2" in writer.tags() else {}
    assert found == pytest.approx(dict(enumerate(validated)), rel=1e-5)


@pytest.mark.parametrize("retry", [False, True])
def test_a_step_that_raises_leaves_nothing_behind_where_the_loop_goes_on(retry):
    """Out of memory in `optimizer.step()`: the batch is dropped, or one more is added to it."""
    model, writer, losses, norms = net(), MemoryWriter(), [], []
    optimizer = sgd(model)

    def out_of_memory(*_):
        raise torch.OutOfMemoryError

    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(6):
            loss = loss_of(model, k)
            loss.backward()
            losses.append(loss.item())
            if k % 3 == 1:
                handle = optimizer.register_step_pre_hook(out_of_memory)
                with pytest.raises(torch.OutOfMemoryError):
                    optimizer.step()
                handle.remove()
                if not retry:
                    optimizer.zero_grad()
                continue
            norms.append(math.hypot(*(p.grad.norm().item() for p in model.parameters())))
            optimizer.step()
            optimizer.zero_grad()
    kept = (losses[1] + losses[2], losses[4] + losses[5]) if retry else (losses[2], losses[5])
    assert writer.scalars("overview/loss") == [
        (k, pytest.approx(loss)) for k, loss in enumerate((losses[0], kept[0], losses[3], kept[1]), 1)
    ]
    assert writer.scalars("overview/grad_norm") == [(k, pytest.approx(norm)) for k, norm in enumerate(norms, 1)]
