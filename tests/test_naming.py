"""The same model has the same names, whatever wraps it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.models import FAMILIES
from torchprobe.naming import ROOT, bare_keys, layer_of, named_modules, named_parameters, owner_of, unwrapped


class DistributedDataParallel(nn.Module):
    """Looks like DDP; the real one needs a process group."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class Fsdp(nn.Module):
    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module


class Checkpointed(nn.Module):
    def __init__(self, module):
        super().__init__()
        self._checkpoint_wrapped_module = module


class _FabricModule(nn.Module):
    """Looks like that of lightning.fabric, which has the model twice: as it runs, and as it was handed over."""

    def __init__(self, model):
        super().__init__()
        self._forward_module = model
        self._original_module = unwrapped(model)


class DeepSpeedEngine(DistributedDataParallel):
    """Looks like DeepSpeed's."""


def compiled(model):
    return torch.compile(model, backend="eager")  # the default backend takes seconds to import


WRAPPERS = [
    DistributedDataParallel,
    Fsdp,
    Checkpointed,
    nn.DataParallel,
    compiled,
    _FabricModule,
    lambda model: compiled(DistributedDataParallel(Fsdp(model))),
    lambda model: _FabricModule(compiled(model)),
    lambda model: compiled(_FabricModule(DistributedDataParallel(model))),
    lambda model: _FabricModule(DeepSpeedEngine(model)),
]


def names_of(model):
    return [name for name, _ in named_modules(model)], [name for name, _ in named_parameters(model)]


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_a_bare_model_are_those_of_torch(family):
    model = FAMILIES[family]()
    modules, parameters = names_of(model)
    assert modules == [name or ROOT for name, _ in model.named_modules()]
    assert parameters == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapper_changes_no_name_and_its_inside_is_the_model(wrap):
    model = FAMILIES["transformer"]()
    expected = names_of(model)
    wrapped = wrap(model)
    assert unwrapped(wrapped) is model
    assert names_of(wrapped) == expected
    assert [m for _, m in named_modules(wrapped)] == list(model.modules())


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_parts_change_no_name(wrap):
    model = FAMILIES["transformer"]()
    expected = names_of(model)
    for block in range(2):
        model.blocks[block] = wrap(model.blocks[block])
    assert names_of(wrap(model)) == expected


def test_an_averaged_model_has_the_names_of_its_model():
    model = FAMILIES["mlp"]()
    assert names_of(torch.optim.swa_utils.AveragedModel(model)) == names_of(model)


def test_the_checkpoint_wrapper_of_torch_changes_no_name():
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    model = FAMILIES["mlp"]()
    expected = names_of(model)
    model[0] = wrapper.checkpoint_wrapper(model[0])
    assert names_of(model) == expected


def test_a_users_own_attribute_called_module_keeps_its_name():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    assert names_of(Encoder()) == ([ROOT, "module"], ["module.weight", "module.bias"])


@pytest.mark.parametrize("name", ["_forward_module", "_original_module"])
def test_a_users_own_attribute_called_as_fabrics_keeps_its_name(name):
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].add_module(name, nn.Linear(2, 2))
    assert names_of(model) == (
        [ROOT, "0", f"0.{name}"],
        ["0.weight", "0.bias", f"0.{name}.weight", f"0.{name}.bias"],
    )
    assert set(bare_keys(model, model.state_dict()).values()) == set(model.state_dict())


def test_fabric_itself_changes_no_name():
    fabric = pytest.importorskip("lightning_fabric")
    model = FAMILIES["mlp"]()
    expected, own = names_of(model), model
    wrapped = fabric.Fabric(accelerator="cpu", devices=1).setup(model)
    assert names_of(wrapped) == expected
    assert unwrapped(wrapped) is own


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_keys_of_a_state_are_those_of_the_bare_model(wrap):
    model = FAMILIES["transformer"]()
    expected = set(model.state_dict())
    model.blocks[0] = wrap(model.blocks[0])
    model.blocks[1].add_module("again", wrap(nn.Sequential(wrap(nn.Linear(2, 2)))))
    more = {"blocks.1.again.0.weight", "blocks.1.again.0.bias"}
    assert set(bare_keys(model, model.state_dict()).values()) == expected | more


def test_shared_modules_and_parameters_have_their_first_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.again = Fsdp(self.first)
            self.other = nn.Linear(3, 3, bias=False)
            self.other.weight = self.first.weight

    assert names_of(Tied()) == ([ROOT, "first", "other"], ["first.weight", "first.bias"])


def test_a_model_that_contains_itself_ends():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].__dict__["_modules"]["parent"] = model
    assert names_of(model) == ([ROOT, "0"], ["0.weight", "0.bias"])


trees = st.recursive(
    st.sampled_from(["linear", "none"]),
    lambda part: st.dictionaries(st.sampled_from("abc"), st.tuples(part, st.sampled_from([None, *WRAPPERS[:3]]))),
    max_leaves=8,
)


def build(tree, wrapped):
    if isinstance(tree, str):
        return nn.Linear(1, 1) if tree == "linear" else nn.Identity()
    module = nn.Module()
    for name, (part, wrap) in tree.items():
        child = build(part, wrapped)
        module.add_module(name, wrap(child) if wrap and wrapped else child)
    return module


@settings(max_examples=60, deadline=None)
@given(trees)
def test_any_tree_has_the_same_names_however_its_parts_are_wrapped(tree):
    bare = build(tree, wrapped=False)
    assert names_of(build(tree, wrapped=True)) == names_of(bare)
    assert names_of(bare)[1] == [name for name, _ in bare.named_parameters()]


def test_a_copy_has_the_same_names():
    model = FAMILIES["cnn"]()
    assert names_of(copy.deepcopy(model)) == names_of(model)


@pytest.mark.parametrize(
    ("parameter", "owner"), [("blocks.0.fc.weight", "blocks.0.fc"), ("fc.bias", "fc"), ("weight", ROOT)]
)
def test_a_parameter_belongs_to_the_module_before_its_last_dot(parameter, owner):
    assert owner_of(parameter) == owner


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("fc.parametrizations.weight", "fc"),
        ("a.fc.parametrizations.weight.0", "a.fc"),
        ("parametrizations.weight", ROOT),
        ("a.fc", "a.fc"),
        (ROOT, ROOT),
    ],
)
def test_what_makes_a_weight_belongs_to_its_layer(module, layer):
    assert layer_of(module) == layer
