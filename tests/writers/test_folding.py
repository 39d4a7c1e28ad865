"""Above 5,000 tags the scalars of layers are one tensor a statistic, and whoever reads the run finds each again."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import torchprobe
from torchprobe.records import Histogram, Record
from torchprobe.reports.run import read_run
from torchprobe.writers.event_file import EventFileWriter
from torchprobe.writers.folding import Folding

ABOUT = {"grad_norm": "", "activation_rms": "", "overview": ""}


def record(step, layers, **more):
    values = {f"grad_norm/layer.{i}": i + step / 8 for i in range(layers)}
    return Record(step, 1.7e9 + step, {"overview/loss": 1.0, **values, **more}, ABOUT)


def written(path, records, **options):
    """What is read of a run that was written in batches, and the tags in its file."""
    writer = EventFileWriter(path, **options)
    for batch in records:
        writer.write(batch)
    writer.close()
    return read_run(path).scalars


def tags(accumulate, path):
    found = accumulate(path).Tags()
    return {*found["scalars"], *found["tensors"]}


@pytest.mark.parametrize(("layers", "folds"), [(98, False), (99, False), (100, True)])
def test_it_begins_above_the_limit_and_every_value_is_read_back(tmp_path, accumulate, layers, folds):
    found = written(tmp_path, [[record(1, layers), record(2, layers)], [record(5, layers)]], most_tags=100)
    assert ("per_layer/grad_norm" in tags(accumulate, tmp_path)) is folds
    assert len(tags(accumulate, tmp_path)) == (3 if folds else 1 + layers)
    for i in range(layers):
        series = found[f"grad_norm/layer.{i}"]
        assert series.steps.tolist() == [1, 2, 5]
        assert series.values == pytest.approx([i + 1 / 8, i + 2 / 8, i + 5 / 8])
    assert found["overview/loss"].steps.tolist() == [1, 2, 5]


def test_layers_may_come_late_and_stay_away_and_values_may_be_anything(tmp_path):
    odd = {"val/activation_rms/a": math.nan, **{f"val/activation_rms/l{i}": math.inf for i in range(40)}}
    few = {"activation_rms/x": 1.0, "activation_rms/y": 2.0}
    batches = [[record(1, 50, **few)], [record(2, 120)], [record(3, 40, **odd)], [record(4, 130)]]
    found = written(tmp_path, batches, most_tags=60)
    assert found["grad_norm/layer.45"].steps.tolist() == [1, 2, 4]
    assert found["grad_norm/layer.125"].steps.tolist() == [4]
    assert found["grad_norm/layer.125"].values.tolist() == [125.5]
    assert math.isnan(found["val/activation_rms/a"].last)
    assert found["val/activation_rms/l7"].last == math.inf
    assert found["activation_rms/y"].last == 2.0


def test_what_is_no_scalar_of_a_probe_stays(tmp_path, accumulate):
    histogram = Histogram(np.array([0.0, 1.0]), np.array([3]))
    more = {**{f"mine/{i}": float(i) for i in range(60)}, **{f"histograms/{i}": histogram for i in range(60)}}
    written(tmp_path, [[record(1, 60, **more)]], most_tags=50)
    assert {"mine/7", "histograms/7", "overview/loss"} <= tags(accumulate, tmp_path)
    assert "grad_norm/layer.7" not in tags(accumulate, tmp_path)


def test_another_file_has_the_names_again(tmp_path):
    writer = EventFileWriter(tmp_path, most_tags=50)
    writer.write([record(1, 60)])
    writer.path.unlink()
    writer.write([record(2, 60)])
    writer.close()
    assert read_run(tmp_path).scalars["grad_norm/layer.59"].steps.tolist() == [2]


def test_a_run_that_goes_on_in_another_process_may_have_other_layers(tmp_path):
    written(tmp_path, [[record(1, 60)], [record(2, 60)]], most_tags=50)
    fewer = record(2, 60)
    fewer = replace(fewer, values={tag: v for tag, v in fewer.values.items() if tag != "grad_norm/layer.0"})
    found = written(tmp_path, [[fewer]], most_tags=50, restart_step=2)
    assert found["grad_norm/layer.0"].steps.tolist() == [1]
    assert found["grad_norm/layer.41"].values.tolist() == [41.125, 41.25]


def test_a_batch_that_is_tried_again_is_folded_the_same():
    first, second, start = record(1, 60), record(2, 70), Folding(65)
    _, after = start.fold(first)
    once, again = after.fold(second), after.fold(second)
    assert once[0].values.keys() == again[0].values.keys()
    assert once[0].values["per_layer/names"] == again[0].values["per_layer/names"]


def test_a_large_model_is_said_once_and_its_report_has_every_layer(tmp_path, caplog):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(450)))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with torchprobe.instrument(model, log_dir=tmp_path, every=1):
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(3, 2)).sum().backward()
            optimizer.step()
    assert len([r for r in caplog.records if "one tensor a statistic" in r.message]) == 1
    run = read_run(tmp_path)
    assert len(run.scalars) > 5_000
    assert len(run.group("grad_norm_layer")) == 450
    assert run.scalars["grad_norm_layer/449"].steps.tolist() == [1, 2]


@pytest.mark.parametrize("wrong", [2.5, "many", True])
def test_a_wrong_limit_is_refused(tmp_path, wrong):
    with pytest.raises(TypeError, match=r"most_tags=.*takes a number of tags or None"):
        EventFileWriter(tmp_path, most_tags=wrong)


def test_none_is_never(tmp_path, accumulate):
    written(tmp_path, [[record(1, 6_000)]], most_tags=None)
    assert len(tags(accumulate, tmp_path)) == 6_001
