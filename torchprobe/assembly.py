"""The parts of a session that watch the model, put together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from torchprobe.buffer.outlet import Outlet
from torchprobe.buffer.step import TransferBuffers
from torchprobe.capture.sharding import is_flat_sharded
from torchprobe.capture.sites import SITE
from torchprobe.naming import all_modules, all_parameters, named_modules, unwrapped
from torchprobe.rules.watch import Watch
from torchprobe.steps.recorder import Recorder

_SLOTS_A_PARAMETER = 512  # two histograms and some sums, twice over
_LEAST_SLOTS = 2**18


def checked_model(model: Any, sessions: Iterable[nn.Module]) -> nn.Module:
    """The model itself, without its wrappers. sessions: the models that have one.

    Raises TypeError for what is no module that can be watched, ValueError for one that is watched already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: takes a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a ScriptModule, which runs no Python hooks; instrument the module it was made from")
    _check_wrappers(model)
    root, watched = unwrapped(model), {id(other) for other in sessions}
    if id(root) in watched:
        raise ValueError(
            "model is already instrumented: torchprobe.session_of(model) returns its session; "
            "call session.detach() before instrumenting it again"
        )
    for name, module in named_modules(root):
        if id(module) in watched or module.__dict__.get(SITE) is not None:
            raise ValueError(f"model shares its module {name!r} with an instrumented model; detach that session first")
    return root


def lanes_for(root: nn.Module) -> TransferBuffers:
    """Slots for the statistics of a model of this size."""
    return TransferBuffers(max(_LEAST_SLOTS, _SLOTS_A_PARAMETER * len(all_parameters(root))))


def _check_wrappers(model: nn.Module) -> None:
    """Raise TypeError for DataParallel, ValueError for FullyShardedDataParallel without its `use_orig_params`."""
    for _, module in all_modules(model):
        if isinstance(module, nn.DataParallel):
            raise TypeError(
                "model: got a DataParallel, which copies the model at every call, so that hooks see pieces of a batch "
                "in several threads; takes DistributedDataParallel, one process a device, or the bare model"
            )
        if is_flat_sharded(module) and not getattr(module, "_use_orig_params", True):
            raise ValueError(
                "model: got a FullyShardedDataParallel with use_orig_params=False, whose flat parameters have lost "
                "their names; takes one with use_orig_params=True, or fully_shard(model)"
            )


def state_lines(recorder: Recorder, outlet: Outlet, watch: Watch) -> Iterator[str]:
    """Lines of a session's summary: what it costs, what was lost, what was never seen."""
    yield f"  time in probes    {recorder.guard.meter.seconds:.3f} s"
    yield f"  skipped steps     {recorder.clock.skipped + outlet.decoder.skipped}"
    yield f"  dropped records   {outlet.drain.dropped}"
    yield f"  alerts            {watch.count}"
    yield from (f"  {fault}" for fault in (*outlet.faults, *watch.faults))
    if captured := recorder.guard.captured["_before"]:
        yield f"  captured steps    {captured}, in graphs of the device: for what replays record see docs/devices.md"
    yield from outlet.drain.ranks
    if outlet.decoder.missing:
        yield f"  nothing captured  {', '.join(outlet.decoder.missing)}"
    yield from (f"  not recorded      {line}" for line in outlet.decoder.unsaid)
    yield from (f"  remark            {remark}. {remark.advice}" for remark in watch.remarks)
    yield from (f"  attention not seen  {what}" for what in recorder.uncovered_attention())
