"""How mixtures of experts share out their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from torchprobe.probes.base import InValidation, Probe, Reporter
from torchprobe.records import Value
from torchprobe.statistics import routing

_MOST = 0.999  # of the tokens have to fit


class Routing(Probe):
    """`router_load/`, `router_entropy/` and `router_dropped/<module>` of routers in mixture layers, in eager passes.

    A router is a module that returns logits over experts, weights, and choices (top-k numbers, or a mask of one expert
    a token), beside experts that are called with these weights and choices, as in the models of transformers. It
    counts when the weights recompute from the logits: in proportion to softmax or sigmoid at the choices. What does
    not, is left out and said in `session.summary()`. All tokens count that the router sees, padding too.
    """

    source: ClassVar[str] = "routers"
    fields: ClassVar[tuple[str, ...]] = routing.FIELDS
    reduce = "sum"
    in_validation: InValidation = "first"  # as of outputs
    found_everywhere: ClassVar[bool] = False
    descriptions: Mapping[str, str] = {
        "router_load": "Share of the tokens that each expert takes (exact); k in sum with k experts a token.",
        "router_entropy": "Entropy in nats of the routing distribution's mean over tokens (exact); at most the "
        "logarithm of the number of experts. Softmax, or sigmoid over its sum, of the router's logits.",
        "router_dropped": "Share of the tokens that no expert takes (exact).",
    }

    def reporter(self) -> Reporter:
        """Which says what did not recompute."""
        return RoutingReporter(self)


class RoutingReporter(Reporter):
    """Names repeat: a row for each expert."""

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """Of each router whose weights are those that its logits give."""
        for name in dict.fromkeys(names):
            taken, tokens, dropped, *readings = rows[[other == name for other in names]].T
            fitting = [
                mass for mass, fits in zip(readings[::2], readings[1::2], strict=True) if fits[0] >= _MOST * tokens[0]
            ]
            if not fitting:
                self.remark(f"router_load of {name} is not recorded: its weights do not recompute from its logits")
                continue
            mean = fitting[0] / fitting[0].sum()
            yield f"router_load/{name}", (taken / tokens).astype(np.float32)
            yield f"router_entropy/{name}", float(-(mean * np.log(np.maximum(mean, 1e-300))).sum())
            yield f"router_dropped/{name}", float(dropped[0] / tokens[0])
