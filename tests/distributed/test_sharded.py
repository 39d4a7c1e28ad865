"""Sharded models: the numbers of the whole model, from the parts that the ranks hold."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import training as t
from tests.distributed.compare import differences
from tests.distributed.launch import launch, need_sharding

TOTALS = {"overview/grad_norm", "overview/grad_norm_unclipped"}
NORMS = ("0.weight", "0.bias", "4.weight", "4.bias")  # of layers that see a part of the sequence


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    need_sharding()
    return launch("tests.distributed.sharded_scenarios", 4, tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def whole():
    return t.alone([[t.tokens(k)] for k in range(t.STEPS)], make=t.scaled)


@pytest.mark.parametrize("how", ["blocks and root", "instrumented before", "not resharded", "root only", "hybrid"])
def test_fully_shard(ranks, whole, how):
    found = ranks[0][how]
    assert found.pop("dropped") == 0
    assert differences(found, whole) == []


@pytest.mark.parametrize("how", ["accumulated", "accumulated, root only"])
def test_accumulation_and_validation(ranks, how):
    batches = [t.micro_batches(k) for k in range(t.STEPS)]
    expected = t.alone(batches, lambda model, k: t.validate(model, t.tokens(100 + k)), make=t.scaled)
    assert any(tag.startswith("val/") for tag in expected)
    found = ranks[0][how]
    assert found.pop("dropped") == 0
    assert differences(found, expected) == []


@pytest.mark.parametrize("how", ["FSDP1", "FSDP1 before", "FSDP1 hybrid"])
def test_flat_parameters_keep_their_names(ranks, whole, how):
    found = ranks[0][how]
    assert found.pop("dropped") == 0
    assert differences(found, whole) == []


@pytest.mark.parametrize("how", ["clipped", "FSDP1 clipped"])
def test_the_norm_before_clipping_is_that_of_the_whole_gradient(ranks, how):
    expected = t.alone([[t.tokens(k)] for k in range(t.STEPS)], make=t.scaled, limit=t.LIMIT)
    assert expected["overview/clipped_fraction"] == dict.fromkeys("123", 1.0)
    found = ranks[0][how]
    assert found.pop("dropped") == 0
    assert differences(found, expected) == []


def test_flat_parameters_without_names_are_refused(ranks):
    assert "use_orig_params=True" in ranks[0]["FSDP1 refused"]


@pytest.mark.parametrize("how", ["tensor parallel", "tensor parallel before", "fully sharded and tensor parallel"])
def test_tensor_parallel(ranks, how):
    expected = t.alone([[t.tokens(k)] for k in range(t.STEPS)], make=t.split_transformer)
    found = ranks[0][how]
    assert found.pop("dropped") == 0
    assert differences(found, expected) == []


def test_mixed_precision_agrees_as_far_as_bfloat16_goes(ranks, whole):
    found = ranks[0]["mixed precision"]
    assert found.pop("dropped") == 0
    assert set(found) == set(whole)
    for tag in whole:
        if tag.startswith(("grad_norm/", "param_norm/", "activation_rms/", "attention_entropy/", "overview/")):
            assert found[tag] == pytest.approx(whole[tag], rel=0.05, abs=2e-3), tag


def test_sequence_parallel_lacks_only_the_gradients_that_are_not_reduced_yet(ranks):
    found, expected = dict(ranks[0]["sequence parallel"]), t.alone_on_sequences()
    assert found.pop("dropped") == 0
    unreduced = {f"{group}/{name}" for group in ("grad_norm", "gradients", "gradients_zeros") for name in NORMS}
    unreduced |= {f"{group}/{layer}" for group in ("grad_norm_layer", "grad_mean_abs") for layer in "04"}
    assert not unreduced & set(found)
    if not torch.__version__.startswith("2.13."):  # of others the optimizers keep momenta of such gradients
        unreduced |= {tag for tag in expected if tag.startswith("optimizer/") and tag not in found}
    known = {tag: steps for tag, steps in expected.items() if tag not in unreduced | TOTALS}
    found = {tag: steps for tag, steps in found.items() if tag not in TOTALS}
    assert differences(found, known) == []


def test_a_gradient_that_is_whole_where_its_parameter_is_split_counts_once(ranks):
    found = ranks[0]["embedding split by rows"]
    assert not all(alike for step in ranks[0]["placed alike"] for alike in step)
    for step, norms in enumerate(ranks[0]["embedding"], 1):
        for name in ("0.weight", "1.weight", "1.bias"):
            assert found[f"grad_norm/{name}"][str(step)] == pytest.approx(norms[name], rel=1e-4), name
        assert found["overview/grad_norm"][str(step)] == pytest.approx(
            sum(norms[name] ** 2 for name in ("0.weight", "1.weight", "1.bias")) ** 0.5, rel=1e-4
        )
    momentum = ranks[0]["embedding"][-1]["momentum"]
    assert found["optimizer/momentum_norm/0"][str(t.STEPS)] == pytest.approx(momentum, rel=1e-4)


def test_parameters_kept_in_host_memory(ranks, whole):
    found = ranks[0]["offloaded"]
    assert found.pop("dropped") == 0
    assert differences(found, whole) == []
