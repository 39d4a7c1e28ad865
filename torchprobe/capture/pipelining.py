"""Stages of `torch.distributed.pipelining`: what their schedules run a module for, and which stages there are.

Nothing here loads that package: it is asked only after the user has.
"""

from __future__ import annotations

import functools
import gc
import sys
from types import CodeType, FrameType
from typing import Any, NamedTuple
from weakref import ReferenceType

import torch
from torch import nn

from torchprobe.buffer.step import Stage
from torchprobe.capture.compiled.private_names import find
from torchprobe.naming import ROOT, named_modules, named_parameters, unwrapped

PIPELINING = "torch.distributed.pipelining"
_STAGE, _SCHEDULE = f"{PIPELINING}.stage:_PipelineStageBase", f"{PIPELINING}.schedules:_PipelineSchedule"
_INFERENCE = tuple(f"{PIPELINING}:PipelineStage.{name}" for name in ("_shape_inference", "_forward_metadata_inference"))


class StageBackward(NamedTuple):
    """A backward pass of a stage. inner: not of the last one. parts: what its gradients are divided by at the end."""

    inner: bool
    parts: int


@functools.cache
def learning_shapes() -> frozenset[CodeType]:
    """The code in which a stage runs its module on memory that nobody has set, to learn what shapes it hands over."""
    return frozenset(function.__code__ for function in map(find, _INFERENCE) if function is not None)


@functools.cache
def backward_code() -> CodeType | None:
    """The code that runs the backward pass of a stage."""
    function = find(f"{PIPELINING}.stage:stage_backward")
    return None if function is None else function.__code__


def in_schedule() -> bool:
    """Whether a pipeline's schedule runs: it tells its losses by itself, and splits backward passes."""
    frame: FrameType | None = sys._getframe() if PIPELINING in sys.modules else None
    while frame is not None and not str(frame.f_globals.get("__name__")).startswith("torch.distributed.pipelining"):
        frame = frame.f_back
    return frame is not None


def backward_of_stage(frame: FrameType) -> StageBackward:
    """What the backward pass of a stage is of, from the frame of `backward_code` or of `input_backward`."""
    stage, schedule = _owner(frame, _STAGE), _owner(frame, _SCHEDULE)
    given = frame.f_locals.get("output_grads") is not None  # ones in the last stage, too, by torch 2.12
    parts = int(getattr(schedule, "_n_microbatches", 1)) if getattr(schedule, "scale_grads", False) else 1
    return StageBackward(given if stage is None else not stage.is_last, parts)


@functools.cache
def _input_code() -> CodeType | None:
    function = find(f"{PIPELINING}._backward:stage_backward_input")
    return None if function is None else function.__code__


def input_backward(frame: FrameType | None) -> FrameType | None:
    """The frame in which a zero-bubble schedule asks for the gradients of a stage's inputs alone, above this one.

    Those of the parameters follow from what that leaves, in calls that begin inside of the graph.
    """
    for _ in range(2):
        if frame is None or frame.f_code is _input_code():
            break
        frame = frame.f_back
    return frame if frame is not None and frame.f_code is _input_code() else None


def _owner(frame: FrameType | None, name: str) -> Any:
    """The object of a class of torch's whose method runs above this frame."""
    kind = find(name)
    while frame is not None and kind is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, kind):
            return owner
        frame = frame.f_back
    return None


def living_stages() -> list[Any]:
    """The stages of this process. Looks at all objects: 50 ms."""
    kind = find(_STAGE) if PIPELINING in sys.modules else None
    return [] if kind is None else [o for o in gc.get_objects() if issubclass(type(o), kind)]


def stages_of(model: ReferenceType[nn.Module]) -> list[Stage]:
    """The stages that a model is, or is made of, in this process."""
    root = model()
    if root is None:
        return []
    names = {module: name for name, module in named_modules(root)}
    found = {stage.stage_index: stage for stage in living_stages() if unwrapped(stage.submod) in names}
    run = {p for stage in found.values() for p in stage.submod.parameters()}
    whole = not run.issuperset(root.parameters())  # what other ranks run is there too: names are those of the whole
    return [_described(stage, names[unwrapped(stage.submod)], whole) for _, stage in sorted(found.items())]


def _described(stage: Any, name: str, whole: bool) -> Stage:
    part = unwrapped(stage.submod)
    before = "" if name == ROOT else f"{name}."
    parameters = {before + inner: inner for inner, _ in named_parameters(part)}
    names = {name if inner == ROOT else before + inner: inner for inner, _ in named_modules(part)} | parameters
    if whole:
        names, parameters = dict(zip(names, names, strict=True)), dict(zip(parameters, parameters, strict=True))
    ranks = torch.distributed.get_process_group_ranks(stage.group)
    return Stage(stage.stage_index, stage.num_stages, ranks, names, list(parameters.values()))
