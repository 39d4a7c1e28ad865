"""What the calls of a pass were, without their tensors: labels are worked out of it where a softmax asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from torchprobe.capture.attention.labels import Label, Memory

Function = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]

_FEW = 2**18
"""Elements of a mask, or of numbers for each row, that are held for the rest of the pass."""


class Node:
    """A tensor as a call made it; the tensor itself is not held.

    args, kwargs: of the call, with nodes for tensors. part: which of several results. storage: where it is in memory.
    const: made of parameters, buffers and numbers alone; learned: a parameter among them. small: the tensor, where it
    is one that holds less than the logits: a mask, or a number for each row.
    """

    __slots__ = (
        *("args", "caller", "const", "flow", "func", "kwargs", "label", "learned"),
        *("dtype", "memory", "part", "small", "storage"),
    )

    def __init__(self, func: Function | None, args: Args, kwargs: Kwargs, part: int, tensor: Tensor) -> None:
        self.func, self.args, self.kwargs, self.part = func, args, kwargs, part
        self.memory = Memory(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        self.storage, self.dtype = _storage(tensor), tensor.dtype
        inputs = list(self.inputs)
        self.const: bool = func is not None and all(node.const for node in inputs)
        self.learned: bool = any(node.learned for node in inputs)
        self.label: Label | None = None
        self.flow: Any = None
        self.caller: Any = None
        self.small: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's."""
        return self.memory.shape

    @property
    def dims(self) -> int:
        """How many dimensions it has."""
        return len(self.memory.shape)

    @property
    def inputs(self) -> Iterator[Node]:
        """The tensors among the arguments of the call."""
        yield from _nodes(self.args)
        if self.kwargs:
            yield from _nodes(self.kwargs.values())

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """One of the call."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def take_label(self, label: Label) -> Label:
        """What was found out, once."""
        self.label = label
        return label

    def take_flow(self, flow: Any) -> None:
        """It holds weights of an attention, or what becomes weights."""
        self.flow = flow

    def called_by(self, caller: Any) -> None:
        """Whose call it was: known of products of activations."""
        self.caller = caller

    def hold(self, tensor: Tensor) -> None:
        """It is small, and read at the softmax."""
        self.small = tensor

    def as_constant(self, learned: bool) -> Node:
        """It is a parameter or a buffer."""
        self.const, self.learned = True, learned
        return self


def _nodes(values: Iterable[Any]) -> Iterator[Node]:
    for value in values:
        if isinstance(value, Node):
            yield value
        elif type(value) in (tuple, list):
            yield from _nodes(value)


class Tape:
    """The tensors of the running pass, by identity."""

    def __init__(self) -> None:
        self._nodes: dict[int, tuple[ref[Tensor], Node]] = {}
        self._buffers: set[int] = set()

    def begin(self, model: nn.Module) -> None:
        """A pass of a model begins."""
        self._nodes.clear()
        self._buffers = {id(buffer) for buffer in model.buffers()}

    def clear(self) -> None:
        """Forget everything: the pass is over."""
        self._nodes.clear()
        self._buffers.clear()

    def known(self, tensor: Any) -> Node | None:
        """The node of a tensor that a call was seen with."""
        found = self._nodes.get(id(tensor))
        return None if found is None or found[0]() is not tensor else found[1]

    def node(self, tensor: Tensor) -> Node:
        """The node of a tensor; one that comes from elsewhere gets one."""
        found = self._nodes.get(id(tensor))
        if found is not None and found[0]() is tensor:
            return found[1]
        node, base = Node(None, (), {}, 0, tensor), tensor._base
        if isinstance(tensor, nn.Parameter) or isinstance(base, nn.Parameter):
            node.as_constant(learned=True)
        elif id(tensor) in self._buffers or (base is not None and id(base) in self._buffers):
            node.as_constant(learned=False)
        return self._put(tensor, node)

    def record(self, func: Function, args: Args, kwargs: Kwargs, result: Any) -> list[Node]:
        """A call has returned: the nodes of its results."""
        results = (result,) if isinstance(result, Tensor) else result
        changed = args[0] if result is None and args and isinstance(args[0], Tensor) else None  # an assignment
        if changed is not None:
            results = (changed,)
        if not isinstance(results, tuple | list) or not any(isinstance(one, Tensor) for one in results):
            return []
        nodes = tuple(map(self._kept, args))
        by_name = {name: self._kept(value) for name, value in kwargs.items()} if kwargs else kwargs
        return [
            self._put(one, Node(func, nodes, by_name, part, one))
            for part, one in enumerate(results)
            if isinstance(one, Tensor) and is_plain(one)
        ]

    def _put(self, tensor: Tensor, node: Node) -> Node:
        self._nodes[id(tensor)] = (ref(tensor), node)
        if len(node.shape) > 2 and 1 in node.shape[-2:] and tensor.numel() <= _FEW:
            node.hold(tensor)
        return node

    def _kept(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.node(value) if is_plain(value) else None
        if type(value) is tuple or type(value) is list:
            return [self._kept(one) for one in value]
        return value


def shares_memory(node: Node, other: Node) -> bool:
    """Whether one is a view of the other, or of the same."""
    return node.storage == other.storage != 0 and node.dtype is other.dtype


def is_plain(tensor: Tensor) -> bool:
    """Whether it says where its elements are."""
    return tensor.layout is torch.strided and not tensor.is_nested


def _storage(tensor: Tensor) -> int:
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a tensor without memory, of a transform
        return 0
