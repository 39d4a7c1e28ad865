"""Keeps what `torch.load(weights_only=True)` could not read out of a checkpoint, before it is written."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_ATOMS = (str, int, float, bool, complex, bytes, type(None), torch.dtype, torch.device, torch.Size)
_TENSORS = (Tensor, nn.Parameter, nn.Buffer)


def plain(value: Any, where: str) -> Any:
    """`value` made of types that weights-only loading takes; numpy's scalars and arrays become Python's and tensors.

    where: what to call the value in messages. Raises TypeError, naming the place, for anything else.
    """
    if type(value) in _ATOMS or type(value) in _TENSORS or type(value) in torch.serialization.get_safe_globals():
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Mapping):
        return _plain_mapping(value, where)
    if isinstance(value, tuple | list | set | frozenset):
        kind = tuple if isinstance(value, tuple) else list if isinstance(value, list) else set
        return kind(plain(item, f"{where}[{i}]") for i, item in enumerate(value))
    raise TypeError(
        f"{where} is a {type(value).__name__}, which torch.load(weights_only=True) does not read: "
        "save plain values and tensors"
    )


def _plain_mapping(value: Mapping[Any, Any], where: str) -> Any:
    items = [(plain(key, f"a key of {where}"), plain(item, f"{where}[{key!r}]")) for key, item in value.items()]
    if type(value) is Counter:
        return Counter(dict(items))
    if type(value) is OrderedDict:
        copy = OrderedDict(items)
        vars(copy).update(plain(vars(value), f"attributes of {where}"))  # `_metadata`, the versions of modules
        return copy
    return dict(items)
