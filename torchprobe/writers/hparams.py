"""What TensorBoard's HParams page reads, in the run itself: hyperparameters at the start, the outcome at the end.

No Experiment record is written: the page then makes its columns from the hyperparameters and scalars of all runs,
whatever each of them has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from torchprobe.records import HParam, HParams, Outcome

START_TAG = "_hparams_/session_start_info"
END_TAG = "_hparams_/session_end_info"
FINAL = "Final"
"""The group of final metrics. The page shows the first five of all scalar tags, by the alphabet: these sort first."""

_EXACT_INTEGERS = 2**53  # the page knows numbers as float64


def checked_hparams(hparams: Mapping[str, Any]) -> dict[str, HParam]:
    """A copy with plain values. numpy's scalars become Python's; what else is no bool, number or string raises.

    Raises TypeError that names the key.
    """
    if not isinstance(hparams, Mapping):
        raise TypeError(f"hparams={hparams!r}: takes a mapping of names to values, such as {{'lr': 1e-3}}")
    return {_checked_name(name): _checked_value(name, value) for name, value in hparams.items()}


def plugin_data(value: HParams | Outcome) -> bytes:
    """The record that the HParams page reads, serialized."""
    from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

    data = plugin_data_pb2.HParamsPluginData()
    if isinstance(value, HParams):
        start = data.session_start_info
        start.start_time_secs = value.started
        for name, hparam in value.values.items():
            _store(start.hparams[name], hparam)
    else:
        data.session_end_info.end_time_secs = value.ended
        data.session_end_info.status = api_pb2.STATUS_SUCCESS if value.success else api_pb2.STATUS_FAILURE
    return bytes(data.SerializeToString())


def read_hparams(plugin_content: bytes) -> dict[str, HParam]:
    """The hyperparameters of a record that `plugin_data` has made of them, sorted by name."""
    from tensorboard.plugins.hparams import plugin_data_pb2

    stored = plugin_data_pb2.HParamsPluginData.FromString(plugin_content).session_start_info.hparams
    return {name: getattr(stored[name], stored[name].WhichOneof("kind")) for name in sorted(stored)}


def _checked_name(name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(f"hparams key {name!r}: takes a string, not {type(name).__name__}")
    return name


def _checked_value(name: object, value: Any) -> HParam:
    plain = value.item() if isinstance(value, np.generic) else value
    if isinstance(plain, bool | int | float | str):
        return plain
    fix = "flatten it, such as {'optimizer.lr': 1e-3}" if isinstance(value, Mapping) else "pass str(value)"
    raise TypeError(
        f"hparams[{name!r}]={value!r}: takes a bool, an int, a float or a string, not {type(value).__name__}; {fix}"
    )


def _store(field: Any, value: HParam) -> None:
    if isinstance(value, bool):  # first: a bool is an int too
        field.bool_value = value
    elif _is_number(value):
        field.number_value = value
    else:
        field.string_value = str(value)


def _is_number(value: HParam) -> bool:
    """Whether the page can show it as a number: it drops NaN and inf, and rounds a long integer, such as a seed."""
    if isinstance(value, int):
        return abs(value) <= _EXACT_INTEGERS
    return isinstance(value, float) and math.isfinite(value)
