"""Sharded models: the numbers of the whole model, from the parts that the ranks hold."""

from __future__ import annotations

import pytest

from tests.distributed import training as t
from tests.distributed.compare import differences
from tests.distributed.launch import launch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
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
            assert found[tag]["1"] == pytest.approx(whole[tag]["1"], rel=0.05, abs=1e-3), tag
