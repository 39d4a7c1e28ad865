"""What a hook can know, and do, while Dynamo traces it into the user's graph or runs it beside one."""

from __future__ import annotations

import functools
import operator
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor

from torchprobe.capture.compat import say_what_graphs_lose, skip_frames, under_transform
from torchprobe.capture.compiled.graphs import attach_guards
from torchprobe.capture.compiled.private_names import find
from torchprobe.capture.frames import place_in
from torchprobe.messages import log as _log
from torchprobe.naming import ROOT

Scope: TypeAlias = Literal["graph", "checkpoint", "elsewhere"]
_P = ParamSpec("_P")
_R = TypeVar("_R")

TRACES_GRADIENT_HOOKS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)

DYNAMO_SWITCH = "torch._C:_dynamo.eval_frame.set_eval_frame"
_WITH_BODY = ("tag_activation_checkpoint", "invoke_subgraph")
_CHECKPOINT = "torch.utils.checkpoint.checkpoint"
_UNCHECKED = "torch._dynamo.utils:_disable_side_effect_safety_checks_for_current_subtracer"
_PACKAGE = str(Path(__file__).parents[2])
_MODULES = torch.nn.modules.module.__file__  # where modules call each other


def constant(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let calls run once, while a graph is traced, and be constants of it: as torch does, less its compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def beside(function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Call a function from such a hook, with nothing in it traced. Costs 0.3 µs."""
    switch = find(DYNAMO_SWITCH)
    if switch is None:
        return _disabled()(function, *args, **kwargs) if "torch._dynamo" in sys.modules else function(*args, **kwargs)
    before = switch(None)
    try:
        return function(*args, **kwargs)
    finally:
        switch(before)


@functools.cache
def _disabled() -> Callable[..., Any]:
    return torch.compiler.disable(lambda function, *args, **kwargs: function(*args, **kwargs))  # type: ignore[no-any-return]


def unseen(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Mark a function that Dynamo must not trace, and whose frame it must not compile; not what it calls."""
    for key in ("disable", "disable_recursive"):
        setattr(function, f"_torchdynamo_{key}", True)
    skip_frames(function)
    return function


skip_frames(beside)


@constant
def scope() -> Scope:
    """Where the hook is traced: in a graph, or in an activation checkpoint in one; statistics can be part of both.

    Elsewhere nothing may be recorded: in an export, a `torch.func` transform, a branch of `torch.cond`.
    """
    attach_guards()
    say_what_graphs_lose()
    translator = _translator()
    if translator is None or getattr(translator, "export", False) or under_transform():
        return "elsewhere"
    if _wants_device_graphs(translator) and not _leaves_operators_out():
        _say_no_device_graphs()
    tracer = translator.output.current_tracer
    if tracer.parent is None:
        return "graph"
    while tracer.parent is not None:
        if getattr(tracer, "description", None) != _CHECKPOINT:
            return "elsewhere"
        tracer = tracer.parent
    return "checkpoint" if find(_UNCHECKED) is not None else "elsewhere"


def run_in(where: Scope, function: Callable[..., Any], *args: Any) -> None:
    """Change Python state from a traced hook.

    In a checkpoint Dynamo forbids it, lest recomputation does it twice; ours is undone before the checkpoint ends,
    or is the same twice.
    """
    if where == "checkpoint":
        torch._dynamo.utils._disable_side_effect_safety_checks_for_current_subtracer(function, *args)  # traced
    else:
        function(*args)


def keeps_address(tensor: Tensor) -> bool:
    """Have graphs of the device write to a tensor where it is. Whether this torch can."""
    mark = find("torch._dynamo:mark_static_address")
    if mark is not None:
        mark(tensor, guard=False)
    return mark is not None


@constant
def becomes_device_graph() -> bool:
    """Whether the frame that is being traced is to run as a graph of the device, which knows of no flag of Python's."""
    return _wants_device_graphs(_translator())


def _wants_device_graphs(translator: Any) -> bool:
    """Whether the graph that is being traced is to run as graphs of the device, as `mode="reduce-overhead"` asks."""
    return bool((getattr(translator.output.compiler_fn, "config", None) or {}).get("triton.cudagraphs"))


def _leaves_operators_out() -> bool:
    """Whether torch captures what lies around our operators, and not them."""
    config = sys.modules.get("torch._inductor.config")
    return hasattr(torch.Tag, "cudagraph_unsafe") and bool(getattr(config, "graph_partition", False))


@functools.cache
def _say_no_device_graphs() -> None:
    _log.warning("sampled steps of a model compiled with mode='reduce-overhead' run without CUDA graphs in this torch")


@constant
def gradient_hooks_trace() -> bool:
    """Whether graphs take hooks on tensors. Until 2.10 they break, until 2.12 the tensor may not change in place."""
    if not TRACES_GRADIENT_HOOKS:
        _say_once()
    return TRACES_GRADIENT_HOOKS


@functools.cache
def _say_once() -> None:
    _log.warning("activation gradients inside compiled graphs need torch 2.13, this is %s", torch.__version__)


@constant
def place() -> int:
    """A number for the call that is being traced, as reached from the innermost module: the same in equal modules."""
    path = []
    translator = getattr(getattr(_translator(), "output", None), "current_tx", None)
    while translator is not None and translator.f_code.co_filename != _MODULES:
        if not translator.f_code.co_filename.startswith(_PACKAGE):
            instruction = getattr(translator, "current_instruction", None)  # a user's compilation must not fail by it
            path.append(place_in(translator.f_code, getattr(instruction, "offset", None)))
        translator = getattr(translator, "parent", None)
    return zlib.crc32(repr(path).encode()) >> 1  # fits an int that a graph takes


class _Nesting:
    """How many modes are at work on one call, in the trace that is running."""

    def __init__(self) -> None:
        self._graph = 0
        self._depth = 0

    def move(self, by: int) -> int:
        """The depth before the move. A trace that was given up does not count in the next."""
        translator = _translator()
        graph = id(translator.output) if translator is not None else 0
        before = self._depth if graph == self._graph else 0
        self._graph, self._depth = graph, max(before + by, 0)
        return before


_nesting = _Nesting()


@constant
def enter_nesting() -> bool:
    """A mode takes on a call: whether it is the first to."""
    return _nesting.move(+1) == 0


@constant
def leave_nesting() -> bool:
    """A mode is done with a call."""
    return _nesting.move(-1) == 1


def may_attend(node: Any) -> bool:
    """Whether attention may be made of a call, as far as the name of what it calls says."""
    space, name = str(getattr(node.target, "namespace", "aten")), str(node.target)
    foreign = space != "aten" and not space.startswith("torchprobe") and name != "register_hook"
    return node.op.startswith("call") and (foreign or re.search("softm|exp(?!and)|atten|attn", name) is not None)


def graph_of_trace() -> Any:
    """The graph that Dynamo builds just now; None in a part of it that is a function of its own."""
    translator = _translator()
    if translator is None or getattr(translator, "export", False):
        return None
    tracer = translator.output.current_tracer
    return tracer.graph if tracer.parent is None else None


def is_constant(node: Any) -> bool:
    """Whether a graph's input is a parameter or a buffer."""
    if isinstance(node.meta.get("example_value"), torch.nn.Parameter):
        return True
    argument = node.meta.get("grapharg")
    name = getattr(getattr(argument, "source", None), "name", "")
    return "_buffers[" in str(name() if callable(name) else name)


def function_of(target: Any, args: list[Any]) -> tuple[Any, list[Any]]:
    """What a call of a graph is outside of graphs, and its arguments in that order."""
    if isinstance(target, str):
        return getattr(Tensor, target, None), args
    name = str(getattr(target, "__name__", ""))
    if getattr(operator, name, None) is not target:
        return target, args
    name = name.strip("_")
    if isinstance(args[0], Tensor):
        return getattr(Tensor, f"__{name}__", None), args
    return getattr(Tensor, f"__r{name}__", None), args[::-1]


def is_torchs(kind: Any) -> bool:
    """Whether a class of modules is PyTorch's own."""
    return str(getattr(kind, "__module__", "")).startswith("torch.")


def modules_around(node: Any) -> list[tuple[str, Any]]:
    """The modules whose code makes a call, the innermost last: identity, and class."""
    return [(str(key), kind) for key, (_, kind) in (node.meta.get("nn_module_stack") or {}).items()]


def module_of(node: Any) -> str:
    """The innermost module of the user's own whose code makes a call, by its way from the traced one."""
    modules = [path for path, kind in (node.meta.get("nn_module_stack") or {}).values() if not is_torchs(kind)]
    return str(modules[-1]) if modules else ROOT


# ---- graphs that are complete, by Dynamo's account of them


def buffers_of(account: Any) -> set[str]:
    """The buffers among the inputs of a graph, as `plainly_named` has them: sources are known of guards alone."""
    return {plainly_named(guard.name) for guard in account.guards if "_buffers[" in guard.name}


def plainly_named(source: str) -> str:
    """What the name of a source and that of the input of a graph that it is have in common."""
    return re.sub("[^a-zA-Z0-9]+", "_", source).strip("_")


def ends_at_a_break(account: Any) -> bool:
    """Whether the frame goes on in another graph."""
    return bool(getattr(getattr(account, "compile_subgraph_reason", None), "graph_break", False))


def body_of(node: Any) -> Any:
    """The graph that an activation checkpoint in a graph is of; None for other calls."""
    if getattr(node.target, "__name__", "") not in _WITH_BODY or not node.args or node.args[0].op != "get_attr":
        return None
    owner = node.graph.owning_module
    return getattr(getattr(owner, str(node.args[0].target), None), "graph", None)


def hint_of(size: Any) -> Any:
    """The number that a symbol was traced with, which asks for no guard; None where there is none; else the same."""
    if not isinstance(size, torch.SymInt):
        return size
    return size.node.hint if size.node.has_hint() else None


def _translator() -> Any:
    """Dynamo's translator of the running frame; None when something else traces."""
    if "torch._dynamo.symbolic_convert" not in sys.modules:
        return None
    current = find("torch._dynamo.symbolic_convert:InstructionTranslator.current_tx")
    try:
        return None if current is None else current()
    except AttributeError:
        return None


def compiles_backward() -> bool:
    """Whether backward passes are compiled, as far as that is known before one begins."""
    if "torch._dynamo.compiled_autograd" not in sys.modules:
        return False
    enabled = getattr(find("torch._dynamo:compiled_autograd"), "compiled_autograd_enabled", False)
    return bool(enabled or getattr(find("torch._dynamo:config"), "compiled_autograd", False))
