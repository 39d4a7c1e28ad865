"""What the calls of a pass were, without their tensors: labels are worked out of it where a softmax asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchprobe.capture.attention.labels import Label, Memory
from torchprobe.capture.attention.sites import constants_of

Function = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]

_COURSES = 4
"""Passes that begin otherwise, of which what was worked out is kept: batches of other shapes, validation."""

_PLAIN = {
    *(int, float, bool, str, complex, type(None), type(Ellipsis), torch.Size),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
}
"""Arguments that can be compared, and hold nothing."""

_BUILT_IN = (BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType)

_FEW = 2**18
"""Elements of a mask, or of numbers for each row, that are held for the rest of the pass."""


class Node:
    """A tensor as a call made it; the tensor itself is not held.

    args, kwargs: of the call, with nodes for tensors, which are `inputs`. part: of several results. const: made of
    parameters, buffers and numbers alone; learned: a parameter among them. sharing: which inputs have the same memory.
    label, kept: what was worked out of it, which holds in all passes that have it. order: how many came before. small:
    the tensor, where it is one that holds less than the logits: a mask, or a number for each row.
    """

    __slots__ = (
        *("args", "caller", "const", "flow", "func", "holds", "inputs", "kept", "kwargs", "label", "learned"),
        *("dtype", "memory", "order", "part", "sharing", "small", "storage"),
    )

    def __init__(self, func: Function | None, args: Args, kwargs: Kwargs, part: int, tensor: Tensor, at: int) -> None:
        self.func, self.args, self.kwargs, self.part, self.order = func, args, kwargs, part, at
        self.memory = Memory(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        self.storage, self.dtype = _storage(tensor), tensor.dtype
        self.inputs = tuple(_nodes((*args, *kwargs.values()) if kwargs else args))
        self.const: bool = func is not None and all(node.const for node in self.inputs[: _counted(func)])
        self.learned: bool = any(node.learned for node in self.inputs)
        self.sharing = [node for node in self.inputs if self._shares(node)]
        self.holds = (len(self.shape) > 2 and 1 in self.shape[-2:] and tensor.numel() <= _FEW) or not self.shape
        self.label: Label | None = None
        self.kept: dict[Any, Any] = {}
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
    def is_logits(self) -> bool:
        """Whether both factors of a product of activations are still told apart in it, as far as is worked out."""
        return self.label is not None and (bool(self.label.sides) or self.label.between is not None)  # of one each

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

    def is_made_of_others(self) -> None:
        """Its call has inputs that are not among the nodes."""
        self.const = False

    def is_again(self, func: Function | None, args: Args, kwargs: Kwargs, part: int, tensor: Tensor) -> bool:
        """Whether a tensor of the running pass is what this one was in an earlier pass; then it stands for it."""
        if self.func is not func and not (type(func) is MethodWrapperType and self.func == func):  # of `x.mT`
            return False
        if self.part != part or self.dtype is not tensor.dtype:
            return False
        if self.memory != (tensor.shape, tensor.stride(), tensor.storage_offset()):
            return False
        if self.args != args or self.kwargs != kwargs:
            return False
        self.storage = _storage(tensor)
        return self.sharing == [node for node in self.inputs if self._shares(node)]

    def _shares(self, node: Node) -> bool:
        return self.storage == node.storage != 0 and self.dtype is node.dtype

    def let_go(self) -> None:
        """The pass is over: hold nothing of it."""
        self.flow = self.small = None

    def unlearn(self) -> None:
        """What was worked out does not hold any more."""
        self.label, self.caller, self.kept = None, None, {}


def _counted(func: Function) -> int | None:
    """How many inputs the values of a result are of, None for all: of others it has the type or the shape."""
    name = str(getattr(func, "__name__", ""))
    if name.endswith("_like") or name.startswith("new_"):
        return None if any(word in name for word in ("zeros", "empty", "full")) else 0  # which are written into
    return 1 if name in ("to", "type", "type_as", "expand_as", "view_as", "reshape_as") else None


def _nodes(values: Iterable[Any]) -> Iterator[Node]:
    for value in values:
        if isinstance(value, Node):
            yield value
        elif type(value) in (tuple, list):
            yield from _nodes(value)


class Tape:
    """The tensors of the running pass, by identity.

    A pass that begins as an earlier one did has the same nodes, with what was worked out of them, as long as it calls
    the same functions with the same arguments.
    """

    def __init__(self) -> None:
        self._nodes: dict[int, tuple[ref[Tensor], Node]] = {}
        self._held: dict[int, ref[Tensor]] = {}  # by modules: buffers, and constants without a batch
        self._earlier: dict[Any, list[Node]] = {}  # by the tensor that a pass begins with
        self._course: list[Node] | None = None  # the nodes of the running pass, and those that may come next
        self._at = 0
        self._plain = True  # whether all arguments so far are such that a later pass can be compared

    def begin(self, modules: Iterable[nn.Module]) -> None:
        """A pass of a model of these modules begins."""
        self.clear()
        self._held = {id(one): ref(one) for module in modules for one in constants_of(module)}

    def clear(self) -> None:
        """Forget all tensors: the pass is over."""
        for node in [node for _, node in self._nodes.values()] + (self._course or []):
            node.let_go()
        self._nodes.clear()
        self._held.clear()
        self._course, self._at, self._plain = None, 0, True

    def known(self, tensor: Any) -> Node | None:
        """The node of a tensor that a call was seen with."""
        found = self._nodes.get(id(tensor))
        return None if found is None or found[0]() is not tensor else found[1]

    def node(self, tensor: Tensor) -> Node:
        """The node of a tensor; one that comes from elsewhere gets one."""
        found = self._nodes.get(id(tensor))
        if found is not None and found[0]() is tensor:
            return found[1]
        base, const, learned = tensor._base, False, False
        if isinstance(tensor, nn.Parameter) or isinstance(base, nn.Parameter):
            const = learned = True
        elif any(one is not None and id(one) in self._held and self._held[id(one)]() is one for one in (tensor, base)):
            const = True
        again = self._again(None, (), {}, 0, tensor)
        if again is not None and again.const == const and again.learned == learned:
            self._at += 1
            return self._put(tensor, again)
        node = Node(None, (), {}, 0, tensor, self._at)
        return self._put(tensor, self._new(node.as_constant(learned) if const else node))

    def record(self, func: Function, args: Args, kwargs: Kwargs, result: Any) -> list[Node]:
        """A call has returned: the nodes of its results."""
        if result is None and args and isinstance(args[0], Tensor):  # an assignment
            result = args[0]
        if func is Tensor.copy_ and (base := self.known(args[0]._base)) is not None:  # which has a part of it now
            self._made(func, (base, *map(self._kept, args[1:])), {}, 0, args[0]._base)
        results = (result,) if isinstance(result, Tensor) else result
        if not isinstance(results, tuple | list) or not any(isinstance(one, Tensor) for one in results):
            return []
        nodes = tuple(map(self._kept, args))
        by_name = {name: self._kept(value) for name, value in kwargs.items()} if kwargs else kwargs
        return [
            self._made(func, nodes, by_name, part, one)
            for part, one in enumerate(results)
            if isinstance(one, Tensor) and is_plain(one)
        ]

    def unlearn_from(self, node: Node) -> None:
        """Something about a node is not what it was: what was worked out of it, and of all after it, is not either."""
        node.unlearn()
        if self._course is not None and self._plain:
            for later in self._course[self._course.index(node) :]:
                later.unlearn()

    def not_again(self, node: Node) -> None:
        """A node holds something of this pass alone: no later pass has it, nor any after it."""
        if self._course is not None and self._plain:
            del self._course[self._course.index(node) :]
        self._plain = False

    def _made(self, func: Function, args: Args, kwargs: Kwargs, part: int, tensor: Tensor) -> Node:
        node = self._again(func, args, kwargs, part, tensor)
        if node is None:
            self._plain = self._plain and _is_torchs(func)
            node = self._new(Node(func, args, kwargs, part, tensor, self._at))
        else:
            self._at += 1
        return self._put(tensor, node)

    def _again(self, func: Function | None, args: Args, kwargs: Kwargs, part: int, tensor: Tensor) -> Node | None:
        """The next node of the earlier pass, if it is the same."""
        course = self._begun(tensor) if self._course is None else self._course
        if not self._plain or self._at >= len(course):
            return None
        node = course[self._at]
        return node if node.is_again(func, args, kwargs, part, tensor) else None

    def _begun(self, tensor: Tensor) -> list[Node]:
        """The course of the earlier pass that began with such a tensor, or a new one."""
        key = (tuple(tensor.shape), tensor.stride(), tensor.dtype)
        self._course = self._earlier.pop(key, [])
        self._earlier[key] = self._course  # the last one to be dropped
        if len(self._earlier) > _COURSES:
            del self._earlier[next(iter(self._earlier))]
        return self._course

    def _new(self, node: Node) -> Node:
        if self._plain and self._course is not None:
            del self._course[self._at :]
            self._course.append(node)
        self._at += 1
        return node

    def _put(self, tensor: Tensor, node: Node) -> Node:
        self._nodes[id(tensor)] = (ref(tensor), node)
        if node.holds:
            node.hold(tensor)
        return node

    def _kept(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.node(value) if is_plain(value) else None
        if type(value) is tuple or type(value) is list:
            return [self._kept(one) for one in value]
        if self._plain and type(value) not in _PLAIN and not _is_plain_slice(value):
            self._plain = False
        return value


def _is_torchs(func: Function) -> bool:
    """Whether a function may be held: not one of the user's, and all that it holds."""
    return type(func) in _BUILT_IN or str(getattr(func, "__module__", "")).startswith("torch")


def _is_plain_slice(value: Any) -> bool:
    return type(value) is slice and {type(value.start), type(value.stop), type(value.step)} <= {int, type(None)}


def is_plain(tensor: Tensor) -> bool:
    """Whether it says where its elements are: a lazy parameter has none yet."""
    return tensor.layout is torch.strided and not tensor.is_nested and not is_lazy(tensor)


def _storage(tensor: Tensor) -> int:
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return tensor.untyped_storage()._cdata if type(tensor).__name__ == "FakeTensor" else 0  # of a compiled graph
    try:
        return tensor.untyped_storage()._cdata if tensor.is_meta else tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a tensor without memory, of a transform
        return 0
