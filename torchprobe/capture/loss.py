"""Temporary."""

from collections import deque
from typing import Any

from torch import Tensor

_REACH = 64


def descends(tensor: Tensor, nodes: list[Any]) -> bool:
    """Whether a tensor was computed from one of the autograd nodes, a few operations away."""
    queue, seen = deque([tensor.grad_fn]), 0
    while queue and seen < _REACH:
        node = queue.popleft()
        seen += 1
        if node is None:
            continue
        if any(node is other for other in nodes):
            return True
        queue.extend(following for following, _ in node.next_functions)
    return False
