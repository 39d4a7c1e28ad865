"""include= and exclude= choose modules by name, and parameters with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchprobe
from tests.models import FAMILIES, inputs
from torchprobe.capture.modules import Selection
from torchprobe.capture.sharding import Named
from torchprobe.naming import ROOT, named_modules, named_parameters
from torchprobe.testing import MemoryWriter


@pytest.fixture
def model():
    return FAMILIES["transformer"]()


def modules(model, include=None, exclude=None, select=None):
    selection, probe = Selection(model, include, exclude), torchprobe.Activations(select=select)
    return [name for name, module in named_modules(model) if selection.wants_module(name, module, probe)]


def parameters(model, include=None, exclude=None, select=None):
    selection, probe = Selection(model, include, exclude), torchprobe.Gradients(select=select)
    return [one.name for one in selection.parameters([Named(n, p, p) for n, p in named_parameters(model)], probe)]


def test_by_default_leaves_with_parameters_norms_and_attention_and_every_parameter(model):
    names = modules(model)
    assert "blocks.0.attention" in names  # a block of several parts
    assert {"embedding", "blocks.0.ln1", "blocks.0.mlp.0", "head"} <= set(names)
    assert not {ROOT, "blocks", "blocks.0", "blocks.0.mlp", "blocks.0.mlp.1", "blocks.0.mlp.3"} & set(names)
    assert parameters(model) == [name for name, _ in model.named_parameters()]


class Experts(nn.Module):
    """As published mixtures of experts: weights of its own, and an activation function beside them."""

    def __init__(self):
        super().__init__()
        self.weight, self.act, self.off = nn.Parameter(torch.ones(2, 8, 8)), nn.GELU(), None

    def forward(self, x):
        return self.act(x @ self.weight).mean(0)


class Sampled(nn.Module):
    """As Bayesian layers: what draws the weight has its mean, too, or a parameter made of it, and is never called."""

    def __init__(self, held=lambda mean: mean):
        super().__init__()
        self.mean, self.sampler = nn.Parameter(torch.ones(8, 8)), nn.Module()
        self.sampler.mean = held(self.mean)


class Patches(nn.Module):
    """A weight of its own beside a layer: what it computes is another layer's, too."""

    def __init__(self):
        super().__init__()
        self.position, self.projection = nn.Parameter(torch.ones(8)), nn.Linear(8, 8)

    def forward(self, x):
        return self.projection(x) + self.position


def test_a_layer_with_weights_of_its_own_may_have_parts_without_any():
    experts = nn.utils.parametrizations.weight_norm(Experts())
    model = nn.Sequential(Patches(), Experts(), experts, nn.Sequential(nn.Linear(8, 1), nn.Dropout()), Sampled())
    assert modules(model) == ["0.projection", "1", "2", "3.0", "4", "4.sampler"]
    assert modules(nn.Sequential(Sampled(nn.Parameter))) == ["0", "0.sampler"]
    assert modules(nn.Sequential(Sampled(lambda mean: nn.Parameter(mean.clone())))) == ["0.sampler"]


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


def test_select_is_of_one_probe_on_top_of_include_and_exclude(model):
    assert modules(model, select="blocks.*.mlp.1") == ["blocks.0.mlp.1", "blocks.1.mlp.1"]  # which no default chooses
    assert modules(model, exclude="blocks.0", select=["blocks.*.mlp.1", "head"]) == ["blocks.1.mlp.1", "head"]
    assert modules(model, include="blocks.0", select="*.attention") == ["blocks.0.attention"]
    assert modules(model, select=lambda name, module: isinstance(module, nn.LayerNorm))[:2] == [
        "blocks.0.ln1",
        "blocks.0.ln2",
    ]


def test_select_chooses_parameters_by_their_names_or_those_of_modules_around_them(model):
    assert parameters(model, select="head") == parameters(model, include="head") != []
    assert parameters(model, select="*.bias", include="head") == ["head.bias"]
    assert parameters(model, select=lambda name, p: p.dim() == 2, include="head") == ["head.weight"]


def recorded(probes, **options):
    model, writer = FAMILIES["mlp"](), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, probes=probes, rules=[], every=1, **options):
        for step in range(2):
            model(inputs("mlp", seed=step)).square().mean().backward()
            optimizer.step()
    return writer


def test_other_probes_see_what_they_saw_before():
    first = next(name for name, module in FAMILIES["mlp"]().named_modules() if isinstance(module, nn.Linear))
    writer = recorded([torchprobe.Activations(select=first), torchprobe.Gradients(), torchprobe.Parameters()])
    named = {tag.partition("/")[2] for tag in writer.tags() if tag.startswith("activation_")}
    assert named == {first}
    every = {name for name, _ in FAMILIES["mlp"]().named_parameters()}
    assert {tag.partition("/")[2] for tag in writer.tags() if tag.startswith("grad_norm/")} == every


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        (torchprobe.Activations(select="nowhere.*"), r"select='nowhere\.\*' of Activations fits nothing.*such as '"),
        (torchprobe.Gradients(select=["*", "*.kernel"]), r"select='\*\.kernel' of Gradients fits nothing.*weight'"),
    ],
)
def test_a_pattern_that_fits_nothing_is_an_error(probe, words):
    with pytest.raises(ValueError, match=words):
        torchprobe.instrument(FAMILIES["mlp"](), writer=MemoryWriter(), probes=[probe])


def test_select_takes_patterns_or_a_predicate_where_there_is_something_to_choose():
    with pytest.raises(TypeError, match="select: got 3"):
        torchprobe.Gradients(select=[3])
    with pytest.raises(TypeError, match="select: Loss watches no modules or parameters"):
        torchprobe.Loss(select="*")


@pytest.mark.parametrize("kind", [torchprobe.Activations, torchprobe.Gradients])
def test_a_predicate_that_raises_ends_its_probe_alone(kind, caplog):
    def raises(name, watched):
        raise ZeroDivisionError("the predicate's own bug")

    writer = recorded([kind(select=raises), torchprobe.Parameters()])
    assert [step for step, _ in writer.scalars("overview/param_norm")] == [1, 2]
    assert sum(f"probe {kind.__name__} failed" in record.getMessage() for record in caplog.records) == 1
