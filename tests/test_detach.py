"""Law 5: detach leaves no trace, however it comes about."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import textwrap
import weakref

import pytest
import torch
from torch import nn

import torchprobe
from tests import warm
from tests.models import Transformer, inputs, mlp
from torchprobe.testing import MemoryWriter


def step(model, optimizer):
    model(inputs("mlp")).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = torchprobe.instrument(model, **{"writer": MemoryWriter(), "every": 1, **options})
    step(model, optimizer)
    return session, optimizer


def test_detach_removes_every_hook_and_attribute(traces):
    model = mlp()
    session, optimizer = trained(model)
    assert traces(model)
    assert session.detach()
    assert not traces(model)
    assert torchprobe.session_of(model) is None
    step(model, optimizer)
    assert session.step == 1


def test_detach_twice_and_logging_after_it_are_harmless():
    session, _ = trained(mlp())
    assert session.detach()
    assert session.detach()
    session.log_metrics({"late": 1.0})
    assert session.flush() is False
    assert not session.attached


OPENED = {
    "session": ("torchprobe.instrument(model, writer=writer, rules=[])", "next_step", "detach"),
    "logger": ("torchprobe.TrainingLogger(writer=writer)", "increment_step", "close"),
}


@pytest.mark.parametrize("kind", OPENED)
@pytest.mark.parametrize(("again", "said"), [("()", "closed\nFalse True\n"), ("", "False None\nclosed\n")])
def test_a_second_detach_waits_for_what_the_first_left_and_so_does_the_programs_end(kind, again, said):
    make, step, close = OPENED[kind]
    script = f"""
        import time, torchprobe
        from tests.models import mlp

        class Slow:
            written = 0
            def write(self, records):
                time.sleep(0.2)
                self.written = records[-1].step
            def close(self):
                print("closed" if self.written >= 5 else self.written, flush=True)

        writer, model = Slow(), mlp()
        opened = {make}
        for _ in range(5):
            opened.log_metrics({{"a": 1.0}})
            opened.{step}()
        print(opened.{close}(0.01), {f"opened.{close}{again}" if again else None})
    """
    call = [*warm.python(), "-c", textwrap.dedent(script)]
    assert subprocess.run(call, capture_output=True, text=True, timeout=120, check=True).stdout == said


def test_the_context_manager_detaches_also_after_an_exception(traces):
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            self.fc(x)
            raise RuntimeError("the user's own error")

    model = Breaks()
    with (
        pytest.raises(RuntimeError, match="user's own"),
        torchprobe.instrument(model, writer=MemoryWriter(), every=1),
    ):
        model(torch.randn(2, 4))
    assert not traces(model)


def test_a_forward_pass_that_raises_leaves_the_next_steps_right():
    writer = MemoryWriter()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        step(model, optimizer)
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 999))
        step(model, optimizer)
        assert session.step == 2
    assert [s for s, _ in writer.scalars("grad_norm/0.weight")] == [1, 2]


def test_the_session_ends_with_its_model():
    writer = MemoryWriter()
    model = mlp()
    trained(model, writer=writer)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert writer.closed
    assert writer.scalars("overview/grad_norm")


def test_a_list_of_models_that_nothing_else_holds_is_said_to_be_gone(caplog):
    """Its parts live on, and nothing of them is recorded."""
    parts = mlp(), mlp()
    session = torchprobe.instrument(nn.ModuleList(parts), writer=MemoryWriter())
    gc.collect()
    assert not session.attached
    assert [message for message in caplog.messages if "was deleted before it was trained" in message]


def test_a_model_that_was_trained_goes_without_a_word(caplog):
    trained(mlp(), writer=MemoryWriter())
    gc.collect()
    assert "deleted" not in caplog.text


def test_hooks_of_the_user_survive_and_still_run():
    calls = []
    model = mlp()
    model[0].register_forward_hook(lambda *_: calls.append("module"))
    model.register_forward_pre_hook(lambda *_: calls.append("root"))
    session, optimizer = trained(model)
    session.detach()
    calls.clear()
    step(model, optimizer)
    assert calls == ["root", "module"]


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_an_attached_model_works_and_is_not_instrumented(way):
    writer = MemoryWriter()
    model = mlp()
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        twin = copied(model, way)
        assert torchprobe.session_of(twin) is None
        twin(inputs("mlp")).sum().backward()
        torch.optim.SGD(twin.parameters(), lr=0.1).step()
        assert session.step == 0
    assert writer.tags() == []
    with torchprobe.instrument(twin, writer=MemoryWriter()):
        pass


def copied(model, way):
    if way == "deepcopy":
        return copy.deepcopy(model)
    if way == "pickle":
        return pickle.loads(pickle.dumps(model))
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def test_instrumenting_twice_is_an_error_that_names_the_way_out():
    model = mlp()
    with torchprobe.instrument(model, writer=MemoryWriter()) as session:
        assert torchprobe.session_of(model) is session
        with pytest.raises(ValueError, match=r"already instrumented.*session_of"):
            torchprobe.instrument(model, writer=MemoryWriter())
        with pytest.raises(ValueError, match="shares its module"):
            torchprobe.instrument(nn.Sequential(model), writer=MemoryWriter())
    with torchprobe.instrument(model, writer=MemoryWriter()):
        pass


def test_state_dict_has_no_new_keys():
    model = Transformer()
    keys = list(model.state_dict())
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1):
        model(inputs("transformer"))
        assert list(model.state_dict()) == keys


def run_script(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*warm.python(), "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.slow
def test_a_script_that_forgets_to_detach_loses_nothing(tmp_path):
    result = run_script(f"""
        import torch, torchprobe
        model = torch.nn.Linear(3, 1)
        torchprobe.instrument(model, log_dir={str(tmp_path)!r})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(7):
            model(torch.randn(2, 3)).sum().backward()
            optimizer.step()
    """)
    assert result.returncode == 0, result.stderr
    assert steps_in(tmp_path, "lr/SGD/group_0") == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.slow
def test_a_forked_child_writes_nothing_and_the_parent_goes_on(tmp_path):
    result = run_script(f"""
        import os, sys, torch, torchprobe
        model = torch.nn.Linear(3, 1)
        session = torchprobe.instrument(model, log_dir={str(tmp_path)!r}, every=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        def step():
            model(torch.randn(2, 3)).sum().backward()
            optimizer.step()
        step()
        child = os.fork()
        if child == 0:
            step(); session.log_metrics({{"child": 1}})
            assert session.flush() is False
            sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        step()
        assert session.detach()
    """)
    assert result.returncode == 0, result.stderr
    assert steps_in(tmp_path, "overview/grad_norm") == [1, 2]
    assert steps_in(tmp_path, "child") == []


def steps_in(directory, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return [event.step for event in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []
