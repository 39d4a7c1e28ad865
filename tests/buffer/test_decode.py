"""Rows become tags; what is missing or broken is said once, and nothing else suffers."""

from __future__ import annotations

import logging
from fractions import Fraction

import numpy as np
import pytest
import torch

from torchprobe.buffer.decode import Decoder
from torchprobe.buffer.step import Piece, StepBuffer, StepInFlight, TransferBuffers
from torchprobe.records import Histogram, Image, Text

DESCRIPTIONS = {"sum": "The sum."}


class Sums:
    """Reports each row's sum, and the total of all rows it is given at once."""

    source = "gradients"

    def report_all(self, names, rows):
        yield from ((f"sum/{name}", float(row.sum())) for name, row in zip(names, rows, strict=True))
        yield "overview/total", float(rows.sum())


class Broken(Sums):
    def report_all(self, names, rows):
        yield "never/seen", 1.0
        raise ZeroDivisionError("the probe's own bug")


@pytest.fixture
def decode():
    """Sends a step, lets it arrive and decodes it; the decoder is `decode.decoder`."""
    buffers, decoder = TransferBuffers(10_000), Decoder(DESCRIPTIONS)

    def run(step=1, **fields):
        return decoder(buffers.send(step, 12.5, StepBuffer(**fields)))

    run.decoder = decoder
    return run


def messages(caplog, words):
    return [record for record in caplog.records if words in record.getMessage()]


def test_a_record_holds_what_was_logged_and_what_probes_report(decode):
    record = decode(
        step=4,
        values={"lr": 0.5},
        scalars={"train/loss": torch.tensor(2.0)},
        pieces=[Piece(Sums(), ["a", "b"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))],
    )
    assert (record.step, record.wall_time, record.descriptions) == (4, 12.5, DESCRIPTIONS)
    assert record.values == {"lr": 0.5, "train/loss": 2.0, "sum/a": 3.0, "sum/b": 7.0, "overview/total": 10.0}


def test_a_step_without_values_gives_no_record(decode):
    assert decode(pieces=[Piece(Sums(), ["a"], torch.zeros(1, 3), counted=True)]) is None


def test_parts_of_a_probe_from_several_optimizers_are_reported_together(decode):
    probe = Sums()
    parts = [Piece(probe, ["a"], torch.ones(1, 2)), Piece(probe, ["b", "c"], torch.full((2, 2), 3.0))]
    record = decode(pieces=parts)
    assert record.values == {"sum/a": 2.0, "sum/b": 6.0, "sum/c": 6.0, "overview/total": 14.0}


def test_two_probes_of_a_class_stay_apart(decode):
    record = decode(
        pieces=[Piece(Sums(), ["a"], torch.ones(1, 2)), Piece(Sums(), ["b"], torch.ones(1, 3), prefix="val/")]
    )
    assert record.values == {"sum/a": 2.0, "overview/total": 2.0, "val/sum/b": 3.0, "val/overview/total": 3.0}


def test_training_and_validation_of_a_probe_stay_apart(decode):
    probe = Sums()
    record = decode(
        pieces=[Piece(probe, ["a"], torch.ones(1, 2)), Piece(probe, ["a"], torch.full((1, 2), 5.0), "val/")]
    )
    assert record.values == {
        "sum/a": 2.0, "overview/total": 2.0, "val/sum/a": 10.0, "val/overview/total": 10.0
    }  # fmt: skip


def test_rows_of_modules_that_did_not_run_are_left_out_and_the_number_of_calls_too(decode):
    rows = torch.tensor([[5.0, 2.0], [9.0, 0.0], [7.0, 1.0]])
    record = decode(pieces=[Piece(Sums(), ["ran", "idle", "once"], rows, counted=True)])
    assert record.values == {"sum/ran": 5.0, "sum/once": 7.0, "overview/total": 12.0}


@pytest.mark.parametrize("flag", [torch.tensor(1.0), torch.tensor([1.0]), torch.tensor(True)])
def test_a_step_that_a_fused_optimizer_skipped_gives_no_record_and_is_counted(decode, flag):
    content = {"values": {"lr": 0.1}, "pieces": [Piece(Sums(), ["a"], torch.ones(1, 2))]}
    assert decode(void=flag, **content) is None
    assert decode(void=torch.zeros_like(flag), **content).values["sum/a"] == 2.0
    assert decode.decoder.skipped == 1


def test_a_report_that_raises_is_logged_once_and_left_out_while_the_others_go_on(decode, caplog):
    broken, sums = Broken(), Sums()
    for step in range(1, 5):
        pieces = [Piece(broken, ["a"], torch.ones(1, 2)), Piece(sums, ["a"], torch.ones(1, 2))]
        record = decode(step, pieces=pieces, due=(broken, sums))
        assert record.values == {"sum/a": 2.0, "overview/total": 2.0}
    (logged,) = messages(caplog, "report of Broken failed")
    assert logged.exc_info
    assert not messages(caplog, "nothing captured")


@pytest.mark.parametrize(
    "parts",
    [
        [Piece(Broken(), ["a"], torch.tensor(1.0))],
        [Piece(Sums(), ["a", "b"], torch.ones(1, 2))],
        [Piece(Sums(), ["a"], torch.ones(2, 2), counted=True)],
    ],
    ids=["no rows", "too few rows", "too many rows"],
)
def test_rows_of_a_wrong_shape_cost_the_record_only_their_own_probe(decode, caplog, parts):
    record = decode(values={"lr": 0.1}, pieces=parts)
    assert record.values == {"lr": 0.1}
    assert len(messages(caplog, "failed and is left out")) == 1


def test_parts_of_unequal_width_cost_the_record_only_their_own_probe(decode, caplog):
    probe = Sums()
    pieces = [Piece(probe, ["a"], torch.ones(1, 2)), Piece(probe, ["b"], torch.ones(1, 3))]
    assert decode(values={"lr": 0.1}, pieces=pieces).values == {"lr": 0.1}
    assert len(messages(caplog, "report of Sums failed")) == 1


def test_what_captured_nothing_is_reported_after_three_sampled_steps_with_the_reason(decode, caplog):
    idle, sums = Sums(), Sums()
    counts = []
    for step in range(1, 7):
        due = (idle, sums) if step != 2 else ()  # step 2 is not sampled
        decode(step, values={"lr": 0.1}, pieces=[Piece(sums, ["a"], torch.ones(1, 2))], due=due)
        counts.append(len(messages(caplog, "nothing captured")))
    assert counts == [0, 0, 0, 1, 1, 1]
    (warning,) = messages(caplog, "nothing captured")
    assert warning.levelno == logging.WARNING
    assert "Sums saw nothing in its first 3 sampled steps" in warning.getMessage()
    assert "no parameter of the model had a gradient" in warning.getMessage()
    assert decode.decoder.missing == ["Sums"]


def test_rows_without_a_call_are_nothing_captured(decode, caplog):
    probe = Sums()
    for step in range(3):
        decode(step, pieces=[Piece(probe, ["a"], torch.zeros(1, 3), counted=True)], due=(probe,))
    assert len(messages(caplog, "nothing captured")) == 1


def test_a_skipped_step_is_no_sampled_step(decode, caplog):
    probe = Sums()
    for step in range(5):
        decode(step, values={"lr": 0.1}, due=(probe,), void=torch.tensor(1.0))
    assert not messages(caplog, "nothing captured")


def test_lost_rows_are_reported_once_and_not_as_nothing_captured(caplog):
    decoder, probe = Decoder({}), Sums()
    for step in range(1, 6):
        record = decoder(StepInFlight(step, 0.0, {"lr": 0.1}, (probe,), lost=True))
        assert record.values == {"lr": 0.1}
    (warning,) = caplog.records
    assert "step 1 found no free slots" in warning.getMessage()


def test_a_value_may_be_an_array(decode):
    class Arrays(Sums):
        def report_all(self, names, rows):
            yield "heads", rows.astype(np.float32)

    record = decode(pieces=[Piece(Arrays(), ["a"], torch.ones(1, 2))])
    np.testing.assert_array_equal(record.values["heads"], np.ones((1, 2), np.float32))


# ---- one odd value never takes a record with it


class Odd(Sums):
    """Reports one odd item, or several, before and after sound ones."""

    def __init__(self, *items):
        self.items = items

    def report_all(self, names, rows):
        yield "mine/first", 1.0
        yield from self.items
        yield "mine/last", 2.0


BAD_HISTOGRAM = Histogram(np.arange(3.0), np.arange(3))
BAD_IMAGE = Image(np.zeros((4, 4), np.uint8))
NO_VALUES = [
    None, "high", [1.0], {"a": 1.0}, object(), 1j, torch.ones(2), np.array(["a"]), np.array([None]), np.ones(2) * 1j,
    Text(3), BAD_HISTOGRAM, Histogram([0.0, 1.0], [1]), BAD_IMAGE, Image(np.zeros((2, 2, 3))), float,
]  # fmt: skip


@pytest.mark.parametrize("value", NO_VALUES, ids=lambda value: type(value).__name__)
def test_an_odd_value_costs_its_tag_alone_and_is_said_once(decode, caplog, value):
    for step in range(1, 4):
        pieces = [Piece(Odd(("mine/odd", value)), ["a"], torch.ones(1, 2)), Piece(Sums(), ["a"], torch.ones(1, 2))]
        record = decode(step, values={"lr": 0.5}, pieces=pieces)
        assert record.values == {"lr": 0.5, "mine/first": 1.0, "mine/last": 2.0, "sum/a": 2.0, "overview/total": 2.0}
    (logged,) = caplog.messages
    assert "mine/odd" in logged
    assert "Odd" in logged
    assert len(decode.decoder.faults) == 1


@pytest.mark.parametrize(
    "item",
    [(3, 1.0), (None, 1.0), ("", 1.0), ("\ud800", 1.0), None, 5, "mine/odd", ("mine/odd",), ("a", 1.0, 2.0)],
    ids=repr,
)
def test_an_odd_tag_or_item_costs_itself_alone_and_is_said_once(decode, caplog, item):
    for step in range(1, 4):
        record = decode(step, pieces=[Piece(Odd(item), ["a"], torch.ones(1, 2))])
        assert record.values == {"mine/first": 1.0, "mine/last": 2.0}
    (logged,) = caplog.messages
    assert "Odd" in logged


def test_numbers_of_any_kind_are_stored_as_floats(decode):
    numbers = [True, 3, np.float32(0.5), np.int64(7), np.bool_(True), torch.tensor(2.5), Fraction(1, 4), 10**400]
    record = decode(pieces=[Piece(Odd(*((f"n/{i}", n) for i, n in enumerate(numbers))), ["a"], torch.ones(1, 2))])
    got = [record.values[f"n/{i}"] for i in range(len(numbers))]
    assert got == [1.0, 3.0, 0.5, 7.0, 1.0, 2.5, 0.25, np.inf]
    assert {type(value) for value in got} == {float}


def test_a_host_value_that_is_no_number_costs_itself_alone(decode, caplog):
    for step in range(1, 4):
        values = {"lr/Own/group_0": None, "lr/Own/group_1": "auto", "lr/Own/group_2": 0.1}
        assert decode(step, values=values).values == {"lr/Own/group_2": 0.1}
    assert ["group_0" in caplog.messages[0], "group_1" in caplog.messages[1]] == [True, True]
    assert len(caplog.messages) == 2


def test_what_a_user_calls_evidence_is_written(decode):
    record = decode(values={"evidence/mean": 2.0}, pieces=[Piece(Odd(("evidence/a", 3.0)), ["a"], torch.ones(1, 2))])
    assert [record.values.get(f"evidence/{name}") for name in ("mean", "a")] == [2.0, 3.0]
    assert record.evidence == {}


def test_tags_that_change_at_every_step_do_not_fill_the_log(decode, caplog):
    for step in range(1, 100):
        decode(step, pieces=[Piece(Odd((f"mine/{step}", None)), ["a"], torch.ones(1, 2))])
    assert len(caplog.messages) == len(decode.decoder.faults) == 20


def test_odd_descriptions_cost_themselves_alone(decode):
    class Described(Sums):
        descriptions = {"sum": 3, "total": None, "fine": "It is."}  # noqa: RUF012

    record = decode(pieces=[Piece(Described(), ["a"], torch.ones(1, 2))])
    assert record.descriptions == {"sum": "The sum.", "fine": "It is."}


@pytest.mark.parametrize("error", [SystemExit(2), KeyboardInterrupt(), MemoryError()], ids=lambda e: type(e).__name__)
def test_a_report_that_ends_the_program_is_left_out_and_said_by_name(decode, caplog, error):
    class Exiting(Sums):
        def report_all(self, names, rows):
            yield "never/seen", 1.0
            raise error

    exiting = Exiting()
    for step in range(1, 4):
        pieces = [Piece(exiting, ["a"], torch.ones(1, 2)), Piece(Sums(), ["a"], torch.ones(1, 2))]
        assert decode(step, pieces=pieces).values == {"sum/a": 2.0, "overview/total": 2.0}
    (logged,) = caplog.messages
    assert "Exiting" in logged
    assert type(error).__name__ in logged
    assert decode.decoder.faults == [f"Exiting is left out: its report raised {type(error).__name__}"]
