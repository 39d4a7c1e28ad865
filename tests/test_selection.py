"""include= and exclude= choose modules by name, and parameters with them."""

from __future__ import annotations

import pytest
from torch import nn

from tests.models import FAMILIES
from torchprobe.capture.selection import Selection
from torchprobe.naming import ROOT, named_modules, named_parameters


@pytest.fixture
def model():
    return FAMILIES["transformer"]()


def modules(model, include=None, exclude=None):
    selection = Selection(model, include, exclude)
    return [name for name, module in named_modules(model) if selection.wants_module(name, module)]


def parameters(model, include=None, exclude=None):
    selection = Selection(model, include, exclude)
    return [name for name, _ in named_parameters(model) if selection.wants_parameter(name)]


def test_by_default_leaves_with_parameters_norms_and_attention_and_every_parameter(model):
    names = modules(model)
    assert "blocks.0.attention" in names  # a block of several parts
    assert {"embedding", "blocks.0.ln1", "blocks.0.mlp.0", "head"} <= set(names)
    assert not {ROOT, "blocks", "blocks.0", "blocks.0.mlp", "blocks.0.mlp.1", "blocks.0.mlp.3"} & set(names)
    assert parameters(model) == [name for name, _ in model.named_parameters()]


def test_include_names_exactly_what_is_watched(model):
    assert modules(model, include="blocks.*.attention") == ["blocks.0.attention", "blocks.1.attention"]
    assert modules(model, include=["head", "blocks.0.mlp"]) == ["blocks.0.mlp", "head"]


def test_parameters_follow_the_module_that_is_included_and_those_inside_it(model):
    assert parameters(model, include=["blocks.1.attention", "head"]) == [
        "blocks.1.attention.qkv.weight",
        "blocks.1.attention.qkv.bias",
        "blocks.1.attention.proj.weight",
        "blocks.1.attention.proj.bias",
        "head.weight",
        "head.bias",
    ]


def test_exclude_leaves_out_a_module_with_everything_inside_it(model):
    for names in (modules(model, exclude="blocks.0"), parameters(model, exclude="blocks.0")):
        assert not [name for name in names if name.startswith("blocks.0")]
        assert [name for name in names if name.startswith("blocks.1")]


def test_exclude_wins_over_include(model):
    assert modules(model, include="blocks.?.ln?", exclude=["blocks.1", "*.ln2"]) == ["blocks.0.ln1"]


def test_a_name_fits_as_a_whole(model):
    with pytest.raises(ValueError, match="fits no module"):
        Selection(model, "block", None)
    assert modules(model, include="HEAD*".lower()) == ["head"]
    with pytest.raises(ValueError, match="fits no module"):
        Selection(model, "HEAD", None)


def test_root_stands_for_the_model_itself_and_not_for_its_parts(model):
    model.scale = nn.Parameter(model.head.bias.detach()[:1].clone())
    assert modules(model, include=ROOT) == [ROOT]
    assert parameters(model, include=ROOT) == ["scale"]
    assert "scale" not in parameters(model, exclude=ROOT)
    assert "head.weight" in parameters(model, exclude=ROOT)


def test_a_model_of_one_module_is_root():
    assert modules(nn.Linear(2, 2)) == [ROOT]
    assert parameters(nn.Linear(2, 2), include=ROOT) == ["weight", "bias"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_fits_nothing_is_refused_with_names_that_exist(model, argument):
    with pytest.raises(ValueError, match=rf"{argument}='nowhere.\*' fits no module.*'embedding'.*\* stands for"):
        Selection(model, **{"include": None, "exclude": None, argument: ["head", "nowhere.*"]})


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("value", [3, ["head", 3], b"head", [["head"]], nn.Linear])
def test_what_is_no_pattern_is_refused_by_the_name_of_the_argument(model, argument, value):
    with pytest.raises(TypeError, match=rf"^{argument}.*takes module-name patterns, such as 'blocks.\*'"):
        Selection(model, **{"include": None, "exclude": None, argument: value})


def test_an_empty_include_is_refused_and_an_empty_exclude_leaves_nothing_out(model):
    with pytest.raises(ValueError, match=r"^include is empty.*leave it out for the default"):
        Selection(model, [], None)
    assert modules(model, exclude=[]) == modules(model)
