"""A model that was compiled, and called, before its hooks were there: its graphs know nothing of them."""

from __future__ import annotations

import logging
from types import CodeType
from weakref import ReferenceType

from torch import nn

from torchprobe.capture.graphs import all_compiled_codes, compiled_codes, drop
from torchprobe.capture.sites import Pass

_log = logging.getLogger("torchprobe")


class LateGraphs:
    """Has such graphs traced once more, when a step is to be sampled. Says so once.

    Other models of the same classes lose their graphs too, which costs them one more compilation.
    """

    def __init__(self, model: ReferenceType[nn.Module], current: Pass) -> None:
        self._model = model
        self._current = current
        self._dropped: set[CodeType] = set()
        self._gave_up = False

    def before_pass(self) -> None:
        """Hooks are on for a step to sample. Graphs that exist, while no hook was ever traced, do not have them."""
        model = self._model()
        self._current.fired = False
        if model is not None and not self._current.compiled:
            self._drop(compiled_codes(model) - self._dropped)

    def after_step(self) -> None:
        """The step is over. When no hook ran, a function of the user's around the model was compiled."""
        if not (self._current.fired or self._current.compiled or self._gave_up):
            self._gave_up = True
            self._drop(all_compiled_codes())

    def _drop(self, codes: set[CodeType]) -> None:
        if not codes:
            return
        if not self._dropped:
            _log.warning("the model was compiled before torchprobe watched it; it is compiled once more, with probes")
        self._dropped |= codes
        drop(codes)
