"""The HParams page of a run."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

import torchprobe
from tests.models import inputs, mlp
from torchprobe.records import Record
from torchprobe.testing import MemoryWriter
from torchprobe.writers.hparams import END_TAG, START_TAG, HParamsWriter, checked_hparams
from torchprobe.writers.json_lines import JsonLinesWriter

HPARAMS = {"lr": 1e-3, "layers": 2, "tied": True, "amp": False, "optimizer": "AdamW"}


@pytest.fixture
def page(tmp_path):
    """What the HParams plugin makes of the runs below the test's directory: (columns, session groups)."""

    def show():
        multiplexer = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
        provider = data_provider.MultiplexerDataProvider(multiplexer, str(tmp_path))
        context = backend_context.Context(base_plugin.TBContext(data_provider=provider))
        request = api_pb2.ListSessionGroupsRequest(
            start_index=0, slice_size=100, allowed_statuses=list(api_pb2.Status.values())
        )
        handler = list_session_groups.Handler(RequestContext(), context, "", request)
        found = context.experiment_from_metadata(
            RequestContext(), "", True, context.hparams_metadata(RequestContext(), ""), []
        )
        return found, handler.run().session_groups

    return show


def train(session, model, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        loss = model(inputs("mlp")).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        session.log_metrics({"loss": loss, "step": step}, prefix="train")
    session.log_metrics({"accuracy": 0.75}, prefix="val")


def plain(field):
    return getattr(field, field.WhichOneof("kind"))


def test_the_page_shows_hparams_final_metrics_and_success(tmp_path, page):
    model = mlp()
    with torchprobe.instrument(model, log_dir=tmp_path / "run", hparams=HPARAMS) as session:
        train(session, model)
    experiment, (group,) = page()
    assert {name: plain(value) for name, value in group.hparams.items()} == HPARAMS
    types = {info.name: info.type for info in experiment.hparam_infos}
    assert (types["tied"], types["lr"]) == (api_pb2.DATA_TYPE_BOOL, api_pb2.DATA_TYPE_FLOAT64)
    metrics = {value.name.tag: (value.training_step, value.value) for value in group.metric_values}
    assert metrics["Final/val/accuracy"] == (3, 0.75)
    assert metrics["Final/train/step"] == (3, 2)
    # The page shows five columns of all scalars, the first by the alphabet.
    assert [tag for tag in sorted(metrics)[:5] if tag.startswith("Final/")] == [
        "Final/train/loss",
        "Final/train/step",
        "Final/val/accuracy",
    ]
    (session_pb,) = group.sessions
    assert session_pb.status == api_pb2.STATUS_SUCCESS
    assert 0 < session_pb.start_time_secs <= session_pb.end_time_secs


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ZeroDivisionError(), api_pb2.STATUS_FAILURE),
        (KeyboardInterrupt(), api_pb2.STATUS_FAILURE),
        (SystemExit(1), api_pb2.STATUS_FAILURE),
        (SystemExit(0), api_pb2.STATUS_SUCCESS),
    ],
)
def test_what_leaves_the_block_is_a_failure_or_an_exit_and_stays_the_users(tmp_path, page, error, status):
    model = mlp()

    def fail():
        with torchprobe.instrument(model, log_dir=tmp_path / "run", hparams=HPARAMS) as session:
            train(session, model)
            raise error

    with pytest.raises(type(error)):
        fail()
    _, (group,) = page()
    assert group.sessions[0].status == status


def test_runs_of_different_hparams_are_rows_of_one_table(tmp_path, page):
    for name, hparams in (("a", {"lr": 1}), ("b", {"lr": 2.5, "dropout": 0.1})):
        model = mlp()
        with torchprobe.instrument(model, log_dir=tmp_path, run_name=name, hparams=hparams) as session:
            train(session, model)
    experiment, groups = page()
    assert {info.name for info in experiment.hparam_infos} == {"lr", "dropout"}
    assert [{name: plain(value) for name, value in g.hparams.items()} for g in groups] == [
        {"lr": 1},
        {"lr": 2.5, "dropout": 0.1},
    ]


def test_no_experiment_record_is_written_and_none_without_hparams(tmp_path, accumulate):
    for name, hparams in (("with", {"lr": 1}), ("without", None)):
        model = mlp()
        with torchprobe.instrument(model, log_dir=tmp_path / name, hparams=hparams) as session:
            train(session, model)
    tags = {name: set(accumulate(tmp_path / name).Tags()["tensors"]) for name in ("with", "without")}
    assert {t for t in tags["with"] if "_hparams_" in t} == {START_TAG, END_TAG}
    assert not {t for t in tags["without"] if "_hparams_" in t}


@pytest.mark.parametrize(
    ("hparams", "words"),
    [
        ([("lr", 1)], r"hparams=.*mapping"),
        ({3: 1}, r"hparams key 3.*string"),
        ({"lr": None}, r"hparams\['lr'\]=None.*NoneType; pass str"),
        ({"sizes": [1, 2]}, r"hparams\['sizes'\].*list; pass str"),
        ({"lr": torch.tensor(0.1)}, r"hparams\['lr'\].*Tensor"),
        ({"optimizer": {"lr": 1}}, r"hparams\['optimizer'\].*dict; flatten it"),
    ],
)
def test_what_the_page_cannot_show_is_refused_by_key(hparams, words, tmp_path):
    with pytest.raises(TypeError, match=words):
        torchprobe.instrument(mlp(), log_dir=tmp_path / "run", hparams=hparams)
    assert not (tmp_path / "run").exists()


def test_numpy_scalars_become_plain_values():
    checked = checked_hparams({"a": np.float32(0.5), "b": np.bool_(True), "c": np.int64(3)})
    assert [(type(v), v) for v in checked.values()] == [(float, 0.5), (bool, True), (int, 3)]


def test_numbers_that_the_page_would_drop_or_round_are_strings(tmp_path, page):
    seed = 2**60 + 1
    model = mlp()
    with torchprobe.instrument(
        model, log_dir=tmp_path / "run", hparams={"seed": seed, "clip": float("inf"), "small": 2**53}
    ) as session:
        train(session, model)
    _, (group,) = page()
    assert {name: plain(v) for name, v in group.hparams.items()} == {"seed": str(seed), "clip": "inf", "small": 2**53}


def test_late_hparams_join_the_first_and_come_too_late_once_these_are_written(caplog):
    writer = MemoryWriter()
    wrapped = HParamsWriter(writer, {"lr": 1})
    wrapped.begin({"dropout": 0.5})
    wrapped.write([Record(1, 0.0, {"loss": 1.0})])
    with caplog.at_level(logging.WARNING, "torchprobe"):
        wrapped.begin({"late": 1})
    wrapped.write([Record(2, 0.0, {"loss": 2.0})])
    wrapped.close()
    assert writer.value(START_TAG).values == {"lr": 1, "dropout": 0.5}
    assert "late" in caplog.text
    assert writer.scalars("Final/loss") == [(2, 2.0)]
    assert writer.closed


def test_a_batch_that_did_not_fit_is_written_again_with_its_hparams():
    class Full(MemoryWriter):
        full = True

        def write(self, records):
            if self.full:
                raise OSError(28, "no space left")
            super().write(records)

    writer = Full()
    wrapped = HParamsWriter(writer, {"lr": 1})
    with pytest.raises(OSError, match="no space"):
        wrapped.write([Record(1, 0.0, {"loss": 1.0})])
    writer.full = False
    wrapped.write([Record(1, 0.0, {"loss": 1.0})])
    assert len([r for r in writer.records if START_TAG in r.values]) == 1


def test_a_run_without_a_record_writes_nothing():
    writer = MemoryWriter()
    HParamsWriter(writer, {"lr": 1}).close()
    assert writer.records == []
    assert writer.closed


def test_json_lines_have_them_as_json(tmp_path):
    writer = HParamsWriter(JsonLinesWriter(tmp_path / "run.jsonl"), {**HPARAMS, "nan": float("nan")})
    writer.write([Record(1, 0.0, {"loss": 1.0})])
    writer.close()
    first, last = (json.loads(line)["values"] for line in (tmp_path / "run.jsonl").read_text().splitlines())
    assert first[START_TAG] == {"hparams": {**HPARAMS, "nan": "NaN"}}
    assert last[END_TAG] == {"success": True}
