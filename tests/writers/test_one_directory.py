"""One directory and several runs: each keeps its own place, and only a loaded state goes on in an old one."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

import torchprobe
from tests.loaders import has_rust_loader, python_points, rust_points
from tests.models import inputs, mlp

LOADERS = [
    python_points,
    pytest.param(rust_points, marks=pytest.mark.skipif(not has_rust_loader(), reason="no data server here")),
]


def train(model, steps, session=None, **values):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(inputs("mlp")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if session is not None and values:
            session.log_metrics(values)


def run_in(log_dir, steps, *, state=None, value=1.0, **options):
    """A whole run: where it ended up, and its state at the end, having gone through a file."""
    file = io.BytesIO()
    with torchprobe.instrument(model := mlp(), log_dir=log_dir, every=1, rules=[], **options) as session:
        if state is not None:
            session.load_state_dict(state)
        train(model, steps, session, seen=value)
        torch.save(session.state_dict(), file)
    file.seek(0)
    return session.log_dir, torch.load(file, weights_only=True)


def seen(directory, load=python_points):
    return load(Path(directory)).get("seen", [])


# Without a state


def test_a_second_run_goes_beside_the_first_and_says_so_once(tmp_path, caplog):
    assert run_in(tmp_path, 4)[0] == tmp_path
    assert run_in(tmp_path, 2, flush_every=1)[0] == tmp_path / "run_2"
    assert run_in(tmp_path, 3)[0] == tmp_path / "run_3"
    lines = [line for line in caplog.messages if str(tmp_path) in line]
    assert [str(tmp_path / f"run_{number}") in line for number, line in enumerate(lines, 2)] == [True, True]
    assert "overwrite=True" in lines[0]
    steps = [len(seen(place)) for place in (tmp_path, tmp_path / "run_2", tmp_path / "run_3")]
    assert steps == [4, 2, 3]


def test_two_models_at_once_share_no_directory(tmp_path):
    models = mlp(), mlp()
    first, second = (torchprobe.instrument(model, log_dir=tmp_path, every=1, flush_every=2) for model in models)
    for _ in range(5):
        train(models[0], 1, first, seen=1.0)
        train(models[1], 1, second, seen=2.0)
    first.detach()
    second.detach()
    assert {first.log_dir, second.log_dir} == {tmp_path, tmp_path / "run_2"}
    assert (seen(first.log_dir), seen(second.log_dir)) == (
        [(s, 1.0) for s in range(1, 6)],
        [(s, 2.0) for s in range(1, 6)],
    )


def test_the_directory_is_what_was_asked_for_until_the_first_write(tmp_path):
    run_in(tmp_path, 1)
    with torchprobe.instrument(model := mlp(), log_dir=tmp_path) as session:
        assert session.log_dir == tmp_path
        train(model, 1)
        assert session.flush()
        assert session.log_dir == tmp_path / "run_2"
        assert str(tmp_path / "run_2") in session.summary()


def test_a_run_that_writes_nothing_takes_no_place(tmp_path):
    with torchprobe.instrument(mlp(), log_dir=tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []
    assert run_in(tmp_path / "run", 1)[0] == tmp_path / "run"


def test_files_of_others_that_are_no_event_files_take_no_place(tmp_path):
    for name in ("config.json", "model.pt", "run_7.txt"):
        (tmp_path / name).touch()
    (tmp_path / "plots").mkdir()
    assert run_in(tmp_path, 1)[0] == tmp_path


def test_numbers_go_on_after_the_largest(tmp_path):
    run_in(tmp_path, 1)
    (tmp_path / "run_7").mkdir()
    assert run_in(tmp_path, 1)[0] == tmp_path / "run_8"


def test_files_of_the_users_own_writer_are_not_hidden(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    own = SummaryWriter(tmp_path)
    for step in range(1, 6):
        own.add_scalar("mine", step, step)
    place, _ = run_in(tmp_path, 3)
    own.close()
    assert place == tmp_path / "run_2"
    assert [step for step, _ in python_points(tmp_path)["mine"]] == [1, 2, 3, 4, 5]


def test_a_writer_of_the_users_own_that_begins_later_is_said_once(tmp_path, caplog):
    from torch.utils.tensorboard import SummaryWriter

    with torchprobe.instrument(model := mlp(), log_dir=tmp_path, every=1, rules=[], flush_every=1) as session:
        train(model, 2)
        assert session.flush()
        own = SummaryWriter(tmp_path)
        own.add_scalar("mine", 1.0, 1)
        own.flush()
        for _ in range(3):
            train(model, 1)
            assert session.flush()
    own.close()
    [said] = [message for message in caplog.messages if "another writer" in message]
    assert str(tmp_path) in said


def test_flight_recordings_stay_with_their_run(tmp_path):
    def loop(steps):
        with torchprobe.instrument(model := mlp(), log_dir=tmp_path, every=1, rules=[]):
            train(model, steps)
            raise KeyError("batch")

    for steps in (2, 3):
        with pytest.raises(KeyError):
            loop(steps)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json"))
    assert found == ["flight/2.json", "run_2/flight/3.json"]


def test_an_alert_before_the_first_write_settles_the_place_for_both(tmp_path):
    run_in(tmp_path, 1)
    rule = lambda record: [torchprobe.Alert("here", record.step, None, 1.0, None, "now")]  # noqa: E731
    with torchprobe.instrument(model := mlp(), log_dir=tmp_path, every=1, rules=[rule]) as session:
        train(model, 1)
    assert session.log_dir == tmp_path / "run_2"
    assert sorted(path.name for path in (tmp_path / "run_2" / "flight").iterdir()) == ["1.json"]
    assert len(list((tmp_path / "run_2").glob("*tfevents*"))) == 1


def test_an_explicit_logger_keeps_its_directory_too(tmp_path):
    places = []
    for options in ({}, {}, {"overwrite": True}):
        with torchprobe.TrainingLogger(tmp_path, "exp", **options) as logger:
            logger.log_metrics({"seen": len(places)})
        places.append(logger.log_dir)
    assert places == [tmp_path / "exp", tmp_path / "exp" / "run_2", tmp_path / "exp"]
    assert (seen(places[0]), seen(places[1])) == ([(1, 2.0)], [(1, 1.0)])


# With a state


@pytest.mark.parametrize("load", LOADERS)
def test_a_loaded_state_goes_on_where_its_run_is(tmp_path, load):
    directory = tmp_path / "run"
    _, first = run_in(directory, 3, value=1.0)
    _, second = run_in(directory, 4, value=2.0)
    assert run_in(directory, 2, state=second, value=2.5)[0] == directory / "run_2"
    assert run_in(directory, 2, state=first, value=1.5)[0] == directory
    assert seen(directory, load) == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.5), (5, 1.5)]
    assert seen(directory / "run_2", load) == [(1, 2.0), (2, 2.0), (3, 2.0), (4, 2.0), (5, 2.5), (6, 2.5)]
    assert not (directory / "run_3").exists()


def test_a_run_that_went_on_can_go_on_again(tmp_path):
    run_in(tmp_path, 1)
    _, state = run_in(tmp_path, 2)
    for steps in (4, 6):
        place, state = run_in(tmp_path, 2, state=state)
        assert place == tmp_path / "run_2"
        assert [step for step, _ in seen(place)] == list(range(1, steps + 1))


def test_a_checkpoint_of_another_runs_state_hides_nothing(tmp_path):
    _, elsewhere = run_in(tmp_path / "a", 2)
    run_in(tmp_path / "b", 5)
    place, _ = run_in(tmp_path / "b", 2, state=elsewhere)
    assert place == tmp_path / "b" / "run_2"
    assert [step for step, _ in seen(tmp_path / "b")] == [1, 2, 3, 4, 5]
    assert [step for step, _ in seen(place)] == [3, 4]


def test_a_state_goes_on_in_a_new_directory(tmp_path):
    _, state = run_in(tmp_path / "a", 2)
    place, _ = run_in(tmp_path / "b", 2, state=state)
    assert place == tmp_path / "b"
    assert [step for step, _ in seen(place)] == [3, 4]


def test_a_state_of_before_runs_had_names_goes_on_in_the_directory_itself(tmp_path):
    _, state = run_in(tmp_path, 4)
    del state["parts"]["run"]
    state["parts"]["clock"]["completed"] = state["parts"]["clock"].get("completed", 4)
    assert run_in(tmp_path, 2, state=state, value=9.0)[0] == tmp_path
    assert seen(tmp_path) == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 9.0), (6, 9.0)]


def test_a_restored_checkpoint_goes_on_in_the_second_run(tmp_path):
    manager = torchprobe.CheckpointManager(tmp_path / "checkpoints")
    run_in(tmp_path / "run", 5)
    with torchprobe.instrument(model := mlp(), log_dir=tmp_path / "run", every=1) as session:
        assert manager.restore(model) is None
        train(model, 3, session, seen=2.0)
        manager.save_checkpoint(model, None, None, 0, session.step, {})
        train(model, 4, session, seen=2.0)  # lost: the restored run goes back to step 3
    with torchprobe.instrument(model := mlp(), log_dir=tmp_path / "run", every=1) as session:
        manager.restore(model)
        train(model, 2, session, seen=3.0)
    assert session.log_dir == tmp_path / "run" / "run_2"
    assert seen(session.log_dir) == [(1, 2.0), (2, 2.0), (3, 2.0), (4, 3.0), (5, 3.0)]
    assert len(seen(tmp_path / "run")) == 5


# On purpose


@pytest.mark.parametrize("load", LOADERS)
def test_overwriting_hides_what_was_there_and_removes_nothing(tmp_path, load, caplog):
    directory = tmp_path / "run"
    run_in(directory, 5, value=1.0)
    before = {path: path.read_bytes() for path in directory.glob("*tfevents*")}
    assert run_in(directory, 2, value=2.0, overwrite=True)[0] == directory
    assert seen(directory, load) == [(1, 2.0), (2, 2.0)]
    assert {path: path.read_bytes() for path in before} == before
    assert not [line for line in caplog.messages if str(directory) in line]


def test_an_overwritten_run_does_not_hide_the_one_that_overwrote_it(tmp_path):
    _, state = run_in(tmp_path, 2)
    run_in(tmp_path, 4, value=2.0, overwrite=True)
    assert run_in(tmp_path, 2, state=state)[0] == tmp_path / "run_2"
    assert seen(tmp_path) == [(step, 2.0) for step in range(1, 5)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"overwrite": 1}, TypeError, "overwrite=1: takes True or False, not int"),
        ({"overwrite": True, "writer": torchprobe.testing.MemoryWriter()}, ValueError, r"writer .*overwrite.* exclude"),
    ],
)
def test_a_wrong_overwrite_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        torchprobe.instrument(mlp(), **options)


def test_a_directory_that_cannot_be_written_is_reported_at_the_call(tmp_path, full_disk):
    with full_disk(0), pytest.raises(OSError, match=r"log_dir='.*File too large.*free space"):
        torchprobe.instrument(mlp(), log_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
