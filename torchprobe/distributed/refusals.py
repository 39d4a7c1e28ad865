"""Wrappers under which a model cannot be watched, each with the way out."""

from __future__ import annotations

from torch import nn

from torchprobe.capture.fully_sharded import is_flat_sharded


def check_wrappers(model: nn.Module) -> None:
    """Raise TypeError for DataParallel, ValueError for FullyShardedDataParallel without its `use_orig_params`."""
    for module in model.modules():
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
