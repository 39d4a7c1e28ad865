"""Pipelines: one run, with the numbers of one process that runs the whole model on the same micro-batches."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from tests.distributed import pipeline_scenarios as p
from tests.distributed.compare import differences
from tests.distributed.launch import launch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch("tests.distributed.pipeline_scenarios", 2, tmp_path_factory.mktemp("pipeline"))


def two_a_stage(tag: str) -> str:
    """Names of the whole model as those of two stages: block 3 is the second one of stage 1."""
    return re.sub(r"/(\d)", lambda found: f"/stage{int(found[1]) // 2}.{int(found[1]) % 2}", tag)


def one_a_stage(tag: str) -> str:
    return re.sub(r"/(\d)", r"/stage\1.block", tag)


@pytest.mark.parametrize("how", ["gpipe", "1f1b"])
def test_stages_with_the_same_names_are_told_apart(ranks, how):
    expected = p.alone(nn.Sequential(*p.blocks(4)), two_a_stage)
    assert {"grad_norm/stage0.0.fc.weight", "activation_mean/stage1.1.fc", "overview/loss"} <= set(expected)
    assert differences(ranks[0][how]["values"], expected) == []


def test_the_loss_is_the_one_whose_gradient_the_optimizers_used(ranks):
    """A schedule divides gradients by the number of micro-batches only when it is told to."""
    expected = p.alone(nn.Sequential(*p.blocks(4)), two_a_stage, scale=1)
    assert differences(ranks[0]["unscaled"]["values"], expected) == []
    first = [ranks[0][how]["values"]["overview/loss"]["1"] for how in ("unscaled", "gpipe")]
    assert first[0] == pytest.approx(p.MICRO * first[1])


@pytest.mark.parametrize("how", ["whole names", "interleaved, whole names"])
def test_names_of_the_whole_model_stay(ranks, how):
    expected = p.alone(nn.Sequential(*p.blocks(4)))
    assert differences(ranks[0][how]["values"], divided_between(expected) if "inter" in how else expected) == []


def divided_between(tags):
    """Of several stages a rank the first ones' gradients are divided while the others' backward passes still run."""
    return {tag: values for tag, values in tags.items() if "clipped" not in tag}


def test_a_whole_model_on_every_rank_has_its_own_names(ranks):
    halves = nn.Sequential(nn.Sequential(*p.blocks(4)[:2]), nn.Sequential(*p.blocks(4)[2:]))
    assert differences(ranks[0]["whole model"]["values"], p.alone(halves)) == []


def test_several_stages_a_rank_are_called_by_their_places_in_the_pipeline(ranks):
    expected = p.alone(nn.Sequential(*p.blocks(4)), one_a_stage)
    assert differences(ranks[0]["interleaved"]["values"], divided_between(expected)) == []
    (line,) = ranks[0]["interleaved"]["lines"]
    assert "left out where gradients were changed between two backward passes" in line


@pytest.mark.parametrize("how", ["zero bubble", "zero bubble, V"])
def test_gradients_of_parameters_may_come_after_those_of_inputs(ranks, how):
    """Then what the backward passes left before it was divided, or clipped, is not there to be read."""
    if ranks[0][how] is None:
        pytest.skip("this schedule does not run on the CPU with this torch")
    expected = p.alone(nn.Sequential(*p.blocks(4)))
    assert differences(ranks[0][how]["values"], without_clipping(expected)) == []
    (line,) = ranks[0][how]["lines"]
    assert "grad_norm_unclipped is left out where a pipeline's schedule gives parameters" in line


def without_clipping(tags):
    return {tag: values for tag, values in tags.items() if "clipped" not in tag}


def test_the_norm_before_clipping_is_that_of_the_divided_gradients(ranks):
    found = ranks[0]["clipped"]["values"]
    expected = p.alone(nn.Sequential(*p.blocks(4)), two_a_stage, clip=0.05)
    assert expected["overview/clipped_fraction"] == {"1": 1.0, "2": 1.0}
    assert differences(found, expected) == []


@pytest.mark.parametrize("how", ["bare layers", "zero bubble, bare layers"])
def test_a_stage_that_is_one_layer_has_the_name_of_its_stage(ranks, how):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(p.WIDTH, 1), nn.Linear(1, p.WIDTH))
    expected = p.alone(layers, lambda tag: re.sub(r"/(\d)", r"/stage\1", tag))
    expected = without_clipping(expected) if "zero" in how else expected
    assert differences(ranks[0][how]["values"], expected) == []


def test_what_pipeline_cuts_keeps_its_names(ranks):
    found, expected = ranks[0]["traced"], p.alone(nn.Sequential(*p.blocks(4)))
    shared = [tag for tag in expected if not tag.startswith("activation")]
    assert differences({tag: found[tag] for tag in shared}, {tag: expected[tag] for tag in shared}) == []


def test_nothing_untrue_is_said(ranks):
    """Learning the shapes that stages hand over is no step, no validation and no loss of `autograd.grad`."""
    for rank in ranks:
        for how, found in rank.items():
            if how != "traced" and found is not None:
                assert [line for line in found["lines"] if "autograd.grad" in line or "nothing captured" in line] == []
                assert found["alerts"] == []
    for found in filter(None, ranks[0].values()):
        assert not [tag for tag in found.get("values", found) if tag.startswith("val/")]
