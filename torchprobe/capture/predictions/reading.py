"""What one output of a module says about its uncertainty, before any statistic."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from torchprobe.capture.predictions.likelihood import Spread


@dataclass(slots=True)
class Reading:
    """What an output says, each part in its own shape and detached; None is what it does not say.

    named: epistemic, aleatoric and total by their names. mean, variance: of a number's prediction; source: what gives
    the variance, still in the graph, and what it is to it. spread_of_means: its epistemic part, of a mixture.
    alpha: of a Dirichlet distribution, (..., classes).
    nu, beta: with alpha, of a normal-inverse-gamma one. kl: a divergence from the prior, one number. entropy: a
    differential one. plain: the tensor that may hold logits, still in the graph; form says what is known of it.
    """

    named: dict[str, Tensor] = field(default_factory=dict)
    mean: Tensor | None = None
    mean_in_graph: Tensor | None = None
    variance: Tensor | None = None
    source: tuple[Tensor, Spread] | None = None
    spread_of_means: Tensor | None = None
    alpha: Tensor | None = None
    nu: Tensor | None = None
    beta: Tensor | None = None
    kl: Tensor | None = None
    entropy: Tensor | None = None
    plain: Tensor | None = None
    form: str = ""  # "logits", "probabilities" or "binary" when it is known which
    note: str = ""

    @property
    def says_something(self) -> bool:
        """Whether there is more than a plain tensor."""
        return bool(self.named) or any(x is not None for x in (self.variance, self.alpha, self.entropy, self.kl))
