"""Under which names attention appears: the nearest module of the model that calls it."""

from __future__ import annotations

import contextlib
import importlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils.checkpoint import checkpoint

import torchprobe
from tests.capture.attention.harness import capture_of, hooked, record, recorded
from tests.models import Transformer
from torchprobe.testing import MemoryWriter

sdpa = F.scaled_dot_product_attention


def heads_first(x, heads: int = 2):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        return sdpa(heads_first(self.q(x)), heads_first(self.k(memory)), heads_first(memory)).transpose(1, 2).flatten(2)


def test_names_are_those_of_the_modules():
    seen = record(Transformer(dropout=0.0), torch.randint(0, 11, (3, 7)))
    assert list(seen.heads) == ["blocks.0.attention", "blocks.1.attention"]


def test_wrappers_do_not_show_in_names(monkeypatch):
    # The device that is not there, once made in this process, is none to spread a model over.
    spreading = importlib.import_module("torch.nn.parallel.data_parallel")  # the package has a function of that name
    monkeypatch.setattr(spreading, "_get_available_device_type", lambda: None)
    model = nn.Sequential(nn.DataParallel(Attention()))
    assert list(record(model, torch.randn(2, 5, 8)).heads) == ["0"]


def attend(module: nn.Module, q, k, v):
    return sdpa(q, k, v)


def test_a_function_without_self_belongs_to_the_module_that_calls_it():
    class Caller(nn.Module):
        def forward(self, x):
            return (lambda y: attend(nn.Identity(), y, y, y))(heads_first(x))

    assert list(record(nn.Sequential(Caller()), torch.randn(2, 5, 8)).heads) == ["0"]


def test_a_helper_that_is_no_module_of_the_model_belongs_to_its_caller():
    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.helpers = [Attention()]

        def forward(self, x):
            return self.helpers[0](x)

    assert list(record(nn.Sequential(Caller()), torch.randn(2, 5, 8)).heads) == ["0"]


def test_calls_of_one_module_are_merged():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x):
            return self.attention(self.attention(x))

    seen = record(Twice(), torch.randn(2, 5, 8))
    assert list(seen.heads) == ["attention"]
    assert seen.of("rows", "attention") == [20, 20]


def test_a_loop_over_one_call_site_is_one_attention():
    class Loop(nn.Module):
        def forward(self, x):
            return sum(sdpa(h, h, h) for h in heads_first(x).split(1, dim=1))

    assert record(Loop(), torch.randn(2, 5, 8)).of("rows") == [20]


class Both(nn.Module):
    """Self- and cross-attention in one module, by one method or by two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = Attention()

    def forward(self, x, memory):
        return self.shared(self.shared(x), memory)


@pytest.mark.parametrize("length", [5, 4])
@pytest.mark.parametrize("first", ["self", "cross"])
def test_self_and_cross_attention_of_one_module_are_two_sites(first, length):
    class Ordered(Both):
        def forward(self, x, memory):
            return super().forward(x, memory) if first == "self" else self.shared(self.shared(x, memory))

    source = nn.Embedding(9, 8)
    x, memory = source(torch.tensor([[1, 2, 3, 4, 5]])) * 2, nn.Embedding(9, 8)(torch.arange(length)[None])
    names = list(record(Ordered(), x, memory).heads)
    assert names == (["shared", "shared/cross"] if first == "self" else ["shared/cross", "shared"])


def test_self_and_cross_attention_of_one_multi_head_module():
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x, memory):
            x = self.attention(x, x, x, need_weights=False)[0]
            return self.attention(x, memory, memory)[0]

    seen = record(Decoder(), torch.randn(2, 5, 8), torch.randn(2, 5, 8))
    assert list(seen.heads) == ["attention", "attention/cross"]
    assert seen.of("rows", "attention/cross") == [10, 10]


def test_a_module_that_does_cross_attention_only_has_its_own_name():
    assert list(record(Attention(), torch.randn(2, 5, 8), torch.randn(2, 3, 8)).heads) == ["root"]


def test_two_call_sites_of_a_module_are_two_attentions():
    class Axial(nn.Module):
        def forward(self, x):
            rows = sdpa(x, x, x)
            columns = x.transpose(1, 2)
            return rows + sdpa(columns, columns, columns).transpose(1, 2)

    assert list(record(Axial(), torch.randn(2, 4, 4, 8)).heads) == ["root", "root/2"]


def test_names_stay_from_step_to_step():
    class Sometimes(nn.Module):
        def forward(self, x, local):
            if local:
                return sdpa(x, x, x[..., :2])
            return sdpa(x, x, x)

    model, x = Sometimes(), torch.randn(2, 2, 5, 4)
    capture = capture_of(model)
    names = []
    with hooked(model, capture):
        for local in (True, False, True):
            model(x, local)
            names += recorded(capture).heads
    assert names == ["root", "root/2", "root"]


def test_micro_batches_of_a_step_are_merged():
    model = Attention()
    capture = capture_of(model)
    a, b = torch.randn(2, 5, 8), torch.randn(3, 4, 8)
    with hooked(model, capture):
        model(a)
        model(b)
        both = recorded(capture)
        model(a)
        first = recorded(capture)
        model(b)
        second = recorded(capture)
    assert both.of("rows") == [22, 22]
    mean = [(10 * a + 12 * b) / 22 for a, b in zip(first.of("entropy"), second.of("entropy"), strict=True)]
    assert both.of("entropy") == pytest.approx(mean)
    assert both.of("max_logit") == list(map(max, first.of("max_logit"), second.of("max_logit")))


def test_collecting_starts_anew_and_keeps_training_and_validation_apart():
    model = Attention()
    capture = capture_of(model)
    with hooked(model, capture, training=False):
        model(torch.randn(2, 5, 8))
    rows = capture.source.rows_of(capture.passes, training=False)
    assert [piece.prefix for piece in rows] == ["val/"]
    assert recorded(capture).of("rows") == [10, 10]
    assert recorded(capture).heads == {}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_attention_counts_once(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x):
            return checkpoint(self.attention, x, use_reentrant=reentrant)

    model = Checkpointed()
    capture = capture_of(model)
    with hooked(model, capture):
        model(torch.randn(2, 5, 8, requires_grad=True)).sum().backward()
    assert recorded(capture).of("rows", "attention") == [10, 10]


def test_a_map_is_that_of_the_first_call():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x):
            written = heads_first(x)
            written = (written @ written.mT).softmax(-1) @ written
            return self.attention(self.attention(x)[:, :3]), written

    seen = record(Twice(), torch.randn(2, 5, 8), maps=True)
    assert {name: tuple(drawn.shape) for name, drawn in seen.kept.items()} == {
        "root": (2, 5, 5),
        "attention": (2, 5, 5),
    }


class AttentionClassifier(nn.Module):
    """Its own code may compute attention, by its name, which a compiled graph would be looked through for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.q = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.Linear(8, 8)
        self.rerun = False

    def attend(self, x):
        return torch.softmax(self.q(x) @ x.mT, -1) @ x

    def forward(self, x):
        attend = partial(checkpoint, self.attend, use_reentrant=False) if self.rerun else self.attend
        return attend(self.layer(x))


@pytest.mark.parametrize("every", [None, 3])
def test_names_are_the_same_in_all_sampled_steps_whatever_of_torchs_runs_in_between(every):
    torch.manual_seed(0)
    model, writer = AttentionClassifier(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, **({} if every is None else {"every": every})):
        for step in range(1, 11):
            model.rerun = step > 5
            with BaseTorchFunctionMode() if step % 2 else contextlib.nullcontext():
                model(torch.randn(3, 5, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    sampled = [1, 2, 5, 10] if every is None else [1, 3, 6, 9]
    found = {
        tag: [at for at, _ in writer.scalars(tag)] for tag in writer.tags() if tag.startswith("attention_entropy/")
    }
    assert found == {"attention_entropy/layer.self_attn": sampled, "attention_entropy/root": sampled}
