"""What a rank says arrives as it was said, over a sequence of messages."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchprobe.buffer.step import WHOLE, Share
from torchprobe.distributed.mailbox import Frame, FrameDecoder, FrameEncoder, Key, Part, Step

NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
NAMES = st.text(max_size=8) | st.sampled_from(["blocks.0.weight", "blocks.1.weight", "Ä 'quoted\" \\ name"])
KEYS = st.builds(Key, *3 * [st.integers(0, 2**40)])
SHARES = st.builds(Share, st.integers(2, 10**12), st.just(1), st.integers(0, 64)) | st.just(WHOLE)


@st.composite
def parts(draw: st.DrawFn) -> Part:
    names = draw(st.lists(NAMES, max_size=5))
    width = draw(st.integers(1, 4))
    rows = np.array([draw(NUMBERS) for _ in range(len(names) * width)], dtype=np.float64).reshape(len(names), width)
    shares = [draw(SHARES) for _ in names] if draw(st.booleans()) else None
    return Part(
        draw(st.sampled_from(["0:Gradients", "1:Loss"])), draw(st.sampled_from(["", "val/"])), names, rows, shares
    )


STEPS = st.builds(Step, KEYS, st.lists(parts(), max_size=3), st.lists(st.integers(0, 99), max_size=3).map(tuple))
FRAMES = st.builds(Frame, st.none() | KEYS, st.lists(STEPS, max_size=3), st.booleans())


def assert_same(found: Frame, sent: Frame) -> None:
    assert (found.mark, found.bye) == (sent.mark, sent.bye)
    assert [(step.key, step.same_data) for step in found.steps] == [(step.key, step.same_data) for step in sent.steps]
    for step, expected in zip(found.steps, sent.steps, strict=True):
        for part, other in zip(step.parts, expected.parts, strict=True):
            assert (part.reporter, part.prefix, part.names) == (other.reporter, other.prefix, list(other.names))
            assert part.rows.dtype == np.float64
            np.testing.assert_array_equal(part.rows, other.rows, strict=True)
            assert part.shards == other.shards


@given(frames=st.lists(FRAMES, max_size=4))
@settings(max_examples=150, deadline=None)
def test_a_sequence_of_frames_arrives_as_it_was_sent(frames):
    encode, decode = FrameEncoder(), FrameDecoder()
    for frame in frames:
        assert_same(decode(encode(frame)), frame)


def step_of(names: list[str]) -> Frame:
    return Frame(Key(0, 1, 0), [Step(Key(0, 1, 0), [Part("0:P", "", names, np.ones((len(names), 2)))])])


def test_a_name_travels_once():
    encode, decode = FrameEncoder(), FrameDecoder()
    first, second = encode(step_of(["a_long_name", "other"])), encode(step_of(["other", "new_one", "a_long_name"]))
    assert b"a_long_name" in zlib.decompress(first)
    assert b"a_long_name" not in zlib.decompress(second)
    assert decode(first).steps[0].parts[0].names == ["a_long_name", "other"]
    assert decode(second).steps[0].parts[0].names == ["other", "new_one", "a_long_name"]


def test_whole_parameters_say_so_without_a_share_each():
    frame = step_of(["a", "b"])
    whole = frame.steps[0].parts[0]._replace(shards=[Share(7, 7, 3), Share(5, 5, 0)])
    found = FrameDecoder()(FrameEncoder()(Frame(None, [Step(Key(0, 1, 0), [whole])])))
    assert found.steps[0].parts[0].shards == [WHOLE, WHOLE]


def test_rows_of_any_layout_and_type_are_sent_as_float64():
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)[::-1, ::2]
    frame = Frame(None, [Step(Key(0, 1, 0), [Part("0:P", "", ["a", "b", "c"], rows)])])
    np.testing.assert_array_equal(FrameDecoder()(FrameEncoder()(frame)).steps[0].parts[0].rows, rows.astype(np.float64))


@pytest.mark.parametrize("spoil", [lambda data: b"", lambda data: data[:-6], lambda data: b"x" + data])
def test_what_is_no_frame_is_an_error(spoil):
    with pytest.raises((ValueError, zlib.error)):
        FrameDecoder()(spoil(FrameEncoder()(step_of(["a"]))))
