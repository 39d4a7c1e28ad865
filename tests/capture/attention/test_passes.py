"""What a forward pass records of attention belongs to it: taken at its end, it counts only where it is asked for."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from tests.capture.attention.harness import hooked, source_of
from tests.capture.attention.passes import Lambda, sdpa
from tests.models import Transformer
from torchprobe.buffer.step import Piece
from torchprobe.capture.attention import stack
from torchprobe.capture.attention.source import AttentionSource, Taken, merged
from torchprobe.naming import named_modules
from torchprobe.statistics.attention import summarise


def taken_from(model: nn.Module, source: AttentionSource, *args, training: bool = True) -> Taken | None:
    with hooked(model, source, training):
        model(*args)
    return source.take()


def entropies(pieces: list[Piece]) -> dict[str, list[float]]:
    return {piece.names[0]: [summarise(row)["entropy"] for row in piece.rows[:, :-1].tolist()] for piece in pieces}


def attend(x):
    return sdpa(x, x, x)


@pytest.fixture
def model():
    return Transformer(dropout=0.0)


def ids(batch: int) -> torch.Tensor:
    return torch.randint(0, 11, (batch, 7))


def test_a_pass_that_is_dropped_leaves_nothing_in_the_next(model):
    source, dropped, counted = source_of(model), ids(3), ids(2)
    assert taken_from(model, source, dropped) is not None
    second = taken_from(model, source, counted)
    assert entropies(source.rows_of([second], True)) == entropies(
        source.rows_of([taken_from(model, source_of(model), counted)], True)
    )


def test_micro_batches_are_one_joined_batch(model):
    source, a, b = source_of(model), ids(3), ids(2)
    parts = [taken_from(model, source, a), taken_from(model, source, b)]
    whole = taken_from(model, source, torch.cat((a, b)))
    split, joined = source.rows_of(parts, True), source.rows_of([whole], True)
    assert [piece.names for piece in split] == [piece.names for piece in joined]
    assert [piece.names[0] for piece in split] == ["blocks.0.attention", "blocks.1.attention"]
    for one, other in zip(split, joined, strict=True):
        torch.testing.assert_close(one.rows, other.rows)


def test_passes_that_are_merged_take_no_more_room_and_make_the_same_rows(model):
    source = source_of(model)
    a, b, c = (taken_from(model, source, ids(n)) for n in (1, 3, 2))
    together = merged(merged(a, b), c)
    assert [len(taken.readings) for taken in (a, together)] == [2, 2]
    assert entropies(source.rows_of([together], True)) == entropies(source.rows_of([a, b, c], True))


def test_sites_stand_in_the_order_in_which_they_were_first_called():
    model = nn.ModuleDict({"a": Lambda(attend), "b": Lambda(attend)})
    model.forward = lambda x, order: [model[name](x) for name in order]
    source, x = source_of(model), torch.randn(2, 3, 5, 4)
    passes = [taken_from(model, source, x, "b"), taken_from(model, source, x, "ab")]
    assert list(entropies(source.rows_of(passes, False))) == ["b", "a"]
    assert {piece.prefix for piece in source.rows_of(passes, False)} == {"val/"}


def test_nothing_is_taken_where_nothing_was_recorded(model):
    plain = nn.Linear(4, 4)
    assert taken_from(plain, source_of(plain), torch.randn(2, 4)) is None
    source = source_of(model)
    source.gate.train = False
    assert taken_from(model, source, ids(2)) is None
    assert source.take() is None
    assert source.rows_of([], True) == []


def test_a_pass_that_raises_is_taken_too_and_one_that_nobody_took_is_dropped():
    def run(x, stop):
        y = attend(x)
        if stop:
            raise KeyError("mine")
        return y

    model, x = Lambda(run), torch.randn(2, 3, 5, 4)
    source = source_of(model)
    with hooked(model, source):
        with pytest.raises(KeyError, match="mine"):
            model(x, True)
        assert source.rows_of([source.take()], True)[0].rows.shape[0] == 3
        with pytest.raises(KeyError, match="mine"):
            model(x, True)
        model(x[:, :, :2], False)
    [(_, reading)] = source.take().readings.items()
    assert [summarise(row)["rows"] for row in reading.rows.tolist()] == [4] * 3


def test_what_is_taken_keeps_nothing_of_the_pass_alive():
    model = Lambda(lambda x: attend(x * 2))
    source, x = source_of(model, maps=True), torch.randn(2, 3, 5, 4, requires_grad=True)
    gc.disable()
    try:
        with hooked(model, source):
            output = model(x)
        taken = source.take()
        gone = [weakref.ref(x), weakref.ref(output)]
        del x, output
        assert [tensor() for tensor in gone] == [None, None]
    finally:
        gc.enable()
    [reading] = taken.readings.values()
    assert not reading.rows.requires_grad
    assert not reading.kept.requires_grad


def test_a_second_thread_neither_ends_nor_takes_a_pass():
    """It runs the model, and all hooks with it, in the middle of the pass that counts."""
    found = []

    def other():
        with torch.no_grad():
            model(x)
        found.append(source.take())

    def run(x):
        y = attend(x)
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=other)
            thread.start()
            thread.join(20)
        return attend(y)

    model, x = Lambda(run), torch.randn(2, 3, 5, 4)
    source = source_of(model)
    taken = taken_from(model, source, x)
    assert found == [None]
    assert list(entropies(source.rows_of([taken], True))) == ["root", "root/2"]
    assert source.uncovered == {"a forward pass beside another one, in a second thread": 1}


def test_a_second_thread_has_its_own_passes_when_the_first_ones_are_over():
    model, x, found = Lambda(attend), torch.randn(2, 3, 5, 4), []
    source = source_of(model)
    assert taken_from(model, source, x) is not None
    thread = threading.Thread(target=lambda: found.append(taken_from(model, source, x)))
    thread.start()
    thread.join(20)
    assert found[0] is not None
    assert source.uncovered == {}


def test_what_a_compiled_graph_records_belongs_to_the_pass_that_runs_it(model):
    source = source_of(model)
    source._running.follow(sampled=True, sampled_val=False)
    source.arm(True, named_modules(model))
    compiled = torch.compile(model, backend="eager")
    try:
        first, batch = (compiled(ids(3)), source.take())[1], ids(2)
        compiled(batch)
        second = source.take()
        assert source.take() is None
    finally:
        source.detach()
    expected = source_of(model)
    assert first is not None
    alone = entropies(expected.rows_of([taken_from(model, expected, batch)], True))
    found = entropies(source.rows_of([second], True))
    assert found.keys() == alone.keys()
    assert all(found[name] == pytest.approx(alone[name], rel=1e-4) for name in alone)


@pytest.mark.parametrize("training", [True, False])
def test_rows_of_training_and_validation_are_apart(training, model):
    source, taken = source_of(model), []
    with hooked(model, source, training):
        for batch in (ids(3), ids(2)):
            model(batch)
            taken.append(source.take())
    pieces = source.rows_of(taken, training)
    assert {piece.prefix for piece in pieces} == {"" if training else "val/"}
    assert {summarise(row)["rows"] for piece in pieces for row in piece.rows[:, :-1].tolist()} == {5 * 7}
    assert source.take() is None


# ---- models and versions of torch that are odd


class Odd(nn.Module):
    """A list that holds None, a part without parameters, a number of heads that cannot be read, odd outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Identity(), None, nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)])
        self.chain = nn.Sequential()

    @property
    def num_heads(self):
        raise RuntimeError("not known yet")

    def forward(self, x):
        for part in self.parts:
            x = x if part is None else part(x)
        x = attend(self.chain(x)[:, None])[:, 0]
        return {"x": x, "nothing": None, "odd": [object(), ("text", 3.5)]}


@pytest.mark.parametrize("training", [True, False])
def test_odd_modules_and_outputs(training):
    model = Odd().train(training)
    source = source_of(model)
    source.arm(True, named_modules(model))
    taken = taken_from(model, source, torch.randn(2, 5, 8), training=training)
    source.detach()
    assert not source.gate.failed
    assert "root" in entropies(source.rows_of([taken], training))


def test_an_error_at_the_start_of_a_pass_ends_the_probe_and_not_the_training(monkeypatch, caplog):
    model = Lambda(attend)
    source, x = source_of(model), torch.randn(2, 3, 5, 4)
    monkeypatch.setattr(source._fast_paths, "begin_pass", lambda *args: 1 / 0)
    with hooked(model, source):
        assert torch.equal(model(x), attend(x))
        assert torch.equal(model(x), attend(x))
    assert source.gate.failed
    assert sum("switched off" in line for line in caplog.messages) == 1


def test_a_callable_that_has_no_hash_runs_as_ever():
    class Unhashable:
        __hash__ = None

        def __call__(self, x):
            return handle_torch_function(self, (x,), x) if has_torch_function_unary(x) else x + 1

    model, x = Lambda(Unhashable()), torch.randn(2, 3)
    with hooked(model, source_of(model)):
        assert torch.equal(model(x), x + 1)


def test_without_a_private_name_of_torch_attention_is_not_recorded_and_one_line_says_so(model, monkeypatch, caplog):
    monkeypatch.setattr(stack, "MISSING", "torch.overrides._push_mode")
    source = source_of(model)
    source.arm(True, named_modules(model))
    assert not any(module._forward_hooks for module in model.modules())
    assert [taken_from(model, source, ids(2)) for _ in range(3)] == [None] * 3
    source.detach()
    assert ["no torch.overrides._push_mode" in line for line in caplog.messages] == [True]
