"""Small programs as people write them: of each the right numbers, or none and one line; of other losses nothing.

A row is a name, a program (a model and the loss of one step) and the truths. The weights stay as they are, so that
the truth is that of every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributions, nn

import torchprobe
from torchprobe.testing import MemoryWriter

torch.manual_seed(7)
X, Y = torch.randn(48, 6), torch.randint(0, 5, (48,))
OTHER, YES = torch.randint(0, 5, (48,)), torch.randint(0, 2, (48, 1)).float()
MANY, NUMBER = torch.randint(0, 2, (48, 5)).float(), torch.randn(48, 1)
IDS = torch.randint(0, 9, (6, 8))
MAPS, KINDS = torch.randn(3, 2, 5, 7), torch.randint(0, 4, (3, 5, 7))
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5])
MASK = (torch.arange(48) % 3 > 0).float()
UNCERTAIN = ("uncertainty_", "overview/epistemic", "overview/aleatoric")
JUDGED = ("calibration/", "overview/ece")


class Gives(nn.Module):
    """A network, and what is made of its output."""

    def __init__(self, net: nn.Module, give: Callable[..., Any] = lambda z: z) -> None:
        super().__init__()
        self.net, self.give = net, give

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Any:
        return self.give(self.net(x), *more, **named)


def linear(out: int = 5, give: Callable[..., Any] = lambda z: z, scale: float = 1.0) -> Gives:
    net = nn.Linear(6, out)
    net.weight.data.mul_(scale)
    return Gives(net, give)


def language() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9))


def accuracy(z: Tensor, y: Tensor) -> float:
    return (z.argmax(-1) == y).double().mean().item()


def entropy(p: Tensor) -> float:
    return torch.special.entr(p.double()).sum(-1).mean().item()


def answers(p: Tensor) -> Tensor:
    return torch.stack((p, 1 - p), -1)


class Program(NamedTuple):
    """make: gives a model and a function of it, the loss of a step. truths: from the model, by tag."""

    name: str
    make: Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]
    truths: Callable[[Any], dict[str, float]]


def classes(name: str, loss: Callable[[Tensor], Tensor], rows: Any = slice(None), scale: float = 1.0) -> Program:
    """Five classes by a linear layer: accuracy over rows that count, entropy over all."""

    def truths(model: Any) -> dict[str, float]:
        z = model(X.clone()).detach()
        return {"calibration/accuracy": accuracy(z[rows], Y[rows]), "uncertainty_total/root": entropy(z.softmax(-1))}

    return Program(name, lambda: (linear(scale=scale), lambda m: loss(m(X.clone()))), truths)


def form(
    name: str, make: Callable[[], nn.Module], loss: Callable[[Any], Tensor], p: Callable[[Any], Tensor]
) -> Program:
    """Another form of output: p says what it predicts, classes last."""
    return Program(
        name, lambda: (make(), lambda m: loss(m(X.clone()))), lambda m: {"uncertainty_total/root": entropy(p(m))}
    )


def says(name: str, make: Callable[[], nn.Module], step: Callable[[Any], Tensor], truths: Any) -> Program:
    return Program(name, lambda: (make(), step), truths)


def likelihood(mean: Tensor, variance: Tensor) -> Tensor:
    return F.gaussian_nll_loss(mean, NUMBER, variance)


def of_answers(m: Any) -> dict[str, float]:
    return {"calibration/accuracy": ((m(X) > 0) == (YES > 0)).double().mean().item()}


def aleatoric(value: Callable[[Any], Tensor]) -> Callable[[Any], dict[str, float]]:
    return lambda m: {"uncertainty_aleatoric/root": value(m).double().mean().item()}


def own_loss(z: Tensor, y: Tensor, shift: int = 0, ignored: int = -100) -> tuple[Tensor, Tensor]:
    p, t = (z[:, :-1], y[:, 1:]) if shift else (z, y)
    return z, F.cross_entropy(p.reshape(-1, z.shape[-1]), t.reshape(-1), ignore_index=ignored)


def of_own_loss(shift: int = 0, ignored: int = -100) -> Callable[[Any], dict[str, float]]:
    def truths(m: Any) -> dict[str, float]:
        z = m.net(IDS)
        z, y = (z[:, :-1], IDS[:, 1:]) if shift else (z, IDS)
        return {"calibration/accuracy": accuracy(z[y != ignored], y[y != ignored])}

    return truths


class Mean(nn.Module):
    """An ensemble in a list, whose mean is the output."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self.parts, self.of = nn.ModuleList(nn.Linear(6, 5) for _ in range(3)), of

    def forward(self, x: Tensor) -> Tensor:
        z = torch.stack([part(x) for part in self.parts])
        return z.mean(0) if self.of == "logits" else z.softmax(-1).mean(0).log()


def of_members(m: Any) -> dict[str, float]:
    p = torch.stack([part(X).softmax(-1) for part in m.parts])
    return {"uncertainty_epistemic/parts": entropy(p.mean(0)) - entropy(p)}


RIGHT = [
    classes("F.cross_entropy", lambda z: F.cross_entropy(z, Y)),
    classes("a sum", lambda z: F.cross_entropy(z, Y, reduction="sum")),
    classes("a module", lambda z: nn.CrossEntropyLoss()(z, Y)),
    classes("a module, weighted and smoothed", lambda z: nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.2)(z, Y)),
    classes("smoothed", lambda z: F.cross_entropy(z, Y, label_smoothing=0.1)),
    classes("class weights", lambda z: F.cross_entropy(z, Y, weight=WEIGHT)),
    classes("divided for accumulation", lambda z: F.cross_entropy(z, Y) / 7),
    classes("log_softmax and nll_loss", lambda z: F.nll_loss(z.log_softmax(-1), Y)),
    classes("NLLLoss on log_softmax", lambda z: nn.NLLLoss()(z.log_softmax(-1), Y)),
    classes("written by hand", lambda z: -z.log_softmax(-1).gather(1, Y[:, None]).mean()),
    classes("by hand with logsumexp", lambda z: (z.logsumexp(-1) - z[torch.arange(48), Y]).mean()),
    classes("a distribution's log_prob", lambda z: -distributions.Categorical(logits=z).log_prob(Y).mean()),
    classes("with a penalty", lambda z: F.cross_entropy(z, Y) + 0.1 * z.detach().square().mean()),
    classes("through a cast", lambda z: F.cross_entropy(z.double(), Y)),
    classes(
        "masked after reduction none", lambda z: (F.cross_entropy(z, Y, reduction="none") * MASK).sum() / 32, MASK > 0
    ),
    classes("a module, masked", lambda z: (nn.CrossEntropyLoss(reduction="none")(z, Y) * MASK).sum() / 32, MASK > 0),
    classes("rows chosen before", lambda z: F.cross_entropy(z[MASK > 0], Y[MASK > 0]), MASK > 0),
    classes("ignored by -100", lambda z: F.cross_entropy(z, Y.where(MASK > 0, -100)), MASK > 0),
    classes("very sure", lambda z: F.cross_entropy(z, Y), scale=300.0),
    classes("very sure, a module", lambda z: nn.CrossEntropyLoss()(z, Y), scale=300.0),
    form(
        "several answers",
        linear,
        lambda z: F.binary_cross_entropy_with_logits(z, MANY),
        lambda m: answers(m(X).sigmoid()),
    ),
    form("answers, by a module", linear, lambda z: nn.BCEWithLogitsLoss()(z, MANY), lambda m: answers(m(X).sigmoid())),
    form(
        "sigmoid inside",
        lambda: linear(1, torch.sigmoid),
        lambda p: F.binary_cross_entropy(p, YES),
        lambda m: answers(m(X)[:, 0]),
    ),
    form(
        "sigmoids inside, BCELoss",
        lambda: linear(5, torch.sigmoid),
        lambda p: nn.BCELoss()(p, MANY),
        lambda m: answers(m(X)),
    ),
    form(
        "softmax inside", lambda: linear(5, lambda z: z.softmax(-1)), lambda p: F.nll_loss(p.log(), Y), lambda m: m(X)
    ),
    form(
        "log_softmax inside",
        lambda: linear(5, lambda z: z.log_softmax(-1)),
        lambda p: F.nll_loss(p, Y),
        lambda m: m(X).exp(),
    ),
    form(
        "a field logits",
        lambda: linear(5, lambda z: {"logits": z}),
        lambda o: F.cross_entropy(o["logits"], Y),
        lambda m: m(X)["logits"].softmax(-1),
    ),
    form(
        "logits of answers",
        lambda: linear(5, lambda z: {"logits": z}),
        lambda o: F.binary_cross_entropy_with_logits(o["logits"], MANY),
        lambda m: answers(m(X)["logits"].sigmoid()),
    ),
    form(
        "a distribution",
        lambda: linear(5, lambda z: distributions.Categorical(logits=z)),
        lambda d: -d.log_prob(Y).mean(),
        lambda m: m(X).probs,
    ),
    says("one answer", lambda: linear(1), lambda m: F.binary_cross_entropy_with_logits(m(X.clone()), YES), of_answers),
    says(
        "one answer, weighted",
        lambda: linear(1),
        lambda m: F.binary_cross_entropy_with_logits(m(X.clone()), YES, pos_weight=torch.tensor(3.0)),
        of_answers,
    ),
    says(
        "pictures",
        lambda: nn.Conv2d(2, 4, 1),
        lambda m: F.cross_entropy(m(MAPS.clone()), KINDS),
        lambda m: {
            "uncertainty_total/root": entropy(m(MAPS).softmax(1).movedim(1, -1)),
            "calibration/accuracy": accuracy(m(MAPS).movedim(1, -1), KINDS),
        },
    ),
    says(
        "a field of pictures, a module",
        lambda: Gives(nn.Conv2d(2, 4, 1), lambda z: {"logits": z}),
        lambda m: nn.CrossEntropyLoss()(m(MAPS.clone())["logits"], KINDS),
        lambda m: {"uncertainty_total/root": entropy(m(MAPS)["logits"].softmax(1).movedim(1, -1))},
    ),
    says(
        "words, shifted outside",
        language,
        lambda m: F.cross_entropy(m(IDS.clone())[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()),
        lambda m: {"calibration/accuracy": accuracy(m(IDS)[:, :-1], IDS[:, 1:])},
    ),
    says("own loss", lambda: Gives(language(), own_loss), lambda m: m(IDS.clone(), IDS.clone())[1], of_own_loss()),
    says(
        "own loss, shifted",
        lambda: Gives(language(), own_loss),
        lambda m: m(IDS.clone(), IDS.clone(), shift=1)[1],
        of_own_loss(1),
    ),
    says(
        "own loss, class 0 ignored",
        lambda: Gives(language(), own_loss),
        lambda m: m(IDS.clone(), IDS.clone(), ignored=0)[1],
        of_own_loss(0, 0),
    ),
    says(
        "own loss, doubled",
        lambda: Gives(language(), own_loss),
        lambda m: 2 * m(IDS.clone(), IDS.clone())[1],
        of_own_loss(),
    ),
    says(
        "mean and log_var",
        lambda: linear(2, lambda z: {"mean": z[:, :1], "log_var": z[:, 1:]}),
        lambda m: (lambda o: likelihood(o["mean"], o["log_var"].exp()))(m(X.clone())),
        aleatoric(lambda m: m(X)["log_var"].exp()),
    ),
    says(
        "mean and sigma",
        lambda: linear(2, lambda z: {"mu": z[:, :1], "sigma": z[:, 1:].exp()}),
        lambda m: (lambda o: likelihood(o["mu"], o["sigma"].square()))(m(X.clone())),
        aleatoric(lambda m: m(X)["sigma"].square()),
    ),
    says(
        "a pair, its second a log_var",
        lambda: linear(2, lambda z: (z[:, :1], z[:, 1:])),
        lambda m: (lambda a, b: likelihood(a, b.exp()))(*m(X.clone())),
        aleatoric(lambda m: m(X)[1].exp()),
    ),
    says(
        "a pair, its second a std",
        lambda: linear(2, lambda z: (z[:, :1], z[:, 1:].exp())),
        lambda m: (lambda a, b: likelihood(a, b.square()))(*m(X.clone())),
        aleatoric(lambda m: m(X)[1].square()),
    ),
    says(
        "a pair, GaussianNLLLoss",
        lambda: linear(2, lambda z: (z[:, :1], z[:, 1:].exp())),
        lambda m: (lambda a, b: nn.GaussianNLLLoss()(a, NUMBER, b))(*m(X.clone())),
        aleatoric(lambda m: m(X)[1]),
    ),
    says(
        "a normal distribution",
        lambda: linear(2, lambda z: distributions.Normal(z[:, :1], z[:, 1:].exp())),
        lambda m: -m(X.clone()).log_prob(NUMBER).mean(),
        aleatoric(lambda m: m(X).variance),
    ),
    says("an ensemble, mean logits", lambda: Mean("logits"), lambda m: F.cross_entropy(m(X.clone()), Y), of_members),
    says(
        "an ensemble, mean probabilities",
        lambda: Mean("probabilities"),
        lambda m: F.nll_loss(m(X.clone()), Y),
        of_members,
    ),
]


class Listed(nn.Module):
    """Modules of one class in a list, and what is done with what they give."""

    def __init__(self, of: Callable[[list[Tensor], Tensor], Tensor], out: int = 5, count: int = 3) -> None:
        super().__init__()
        self.parts, self.gate, self.of = nn.ModuleList(nn.Linear(6, out) for _ in range(count)), nn.Linear(6, count), of
        nn.init.zeros_(self.gate.weight), nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.of([part(x) for part in self.parts], self.gate(x).softmax(-1))


class Switched(nn.Module):
    """A task that an attribute chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.task = nn.ModuleList(nn.Linear(6, 5) for _ in range(2)), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[self.task](x)


def both_tasks(m: Any) -> Tensor:
    batch, losses = X.clone(), []
    for m.task in (0, 1):
        losses.append(F.cross_entropy(m(batch), Y))
    return sum(losses)


def averaged(m: Any) -> Tensor:
    """The weights are others in the second pass, unseen by any version."""
    batch, kept = X.clone(), [p.detach().clone() for p in m.parameters()]
    first = F.cross_entropy(m(batch), Y)
    for p in m.parameters():
        p.data.copy_(p.data * 1.5)
    first.detach_()
    loss = F.cross_entropy(m(batch), Y)
    loss.backward()
    for p, old in zip(m.parameters(), kept, strict=True):
        p.data.copy_(old)
    return F.cross_entropy(m(X.clone()), Y)


def policy(z: Tensor, returns: Tensor) -> Tensor:
    law = distributions.Categorical(logits=z)
    return -(law.log_prob(law.sample()) * returns).mean()


EACH = nn.CrossEntropyLoss(reduction="none")


def module_policy(z: Tensor) -> Tensor:
    return (EACH(z, distributions.Categorical(logits=z).sample()) * RETURNS).mean()


RETURNS, JUDGE = torch.rand(48) * 9 + 1, nn.Linear(5, 1)
TREACHEROUS = [
    ("squared error", linear, lambda m: F.mse_loss(m(X.clone()), MANY), JUDGED + UNCERTAIN),
    (
        "squared error of one-hot rows",
        linear,
        lambda m: F.mse_loss(m(X.clone()), F.one_hot(Y, 5).float()),
        JUDGED + UNCERTAIN,
    ),
    ("a margin loss", linear, lambda m: F.multi_margin_loss(m(X.clone()), Y), JUDGED + UNCERTAIN),
    ("a temperature", linear, lambda m: F.cross_entropy(m(X.clone()) / 2, Y), JUDGED + UNCERTAIN),
    ("an energy", linear, lambda m: m(X.clone()).logsumexp(-1).mean(), JUDGED + UNCERTAIN),
    ("a policy gradient", linear, lambda m: policy(m(X.clone()), RETURNS), JUDGED),
    ("a policy gradient by a module", linear, lambda m: module_policy(m(X.clone())), JUDGED),
    ("a policy gradient, signed", linear, lambda m: policy(m(X.clone()), RETURNS - 5), JUDGED),
    ("a constant reward", linear, lambda m: policy(m(X.clone()), torch.full((48,), 2.7)), JUDGED),
    (
        "cross-entropy with advantages",
        linear,
        lambda m: (F.cross_entropy(m(X.clone()), Y, reduction="none") * RETURNS).mean(),
        JUDGED,
    ),
    ("a discriminator outside", linear, lambda m: F.softplus(-JUDGE(m(X.clone()))).mean(), JUDGED + UNCERTAIN),
    (
        "a discriminator, by a module",
        linear,
        lambda m: nn.BCEWithLogitsLoss()(JUDGE(m(X.clone())), YES),
        JUDGED + UNCERTAIN,
    ),
    (
        "contrastive logits",
        lambda: linear(24),
        lambda m: (lambda z: nn.CrossEntropyLoss()(z[:24] @ z[24:].T, torch.arange(24)))(m(X.clone())),
        JUDGED + UNCERTAIN,
    ),
    (
        "distillation",
        linear,
        lambda m: F.kl_div(m(X.clone()).log_softmax(-1), MANY.softmax(-1), reduction="batchmean"),
        JUDGED,
    ),
    ("soft targets", linear, lambda m: F.cross_entropy(m(X.clone()), (3 * MANY).softmax(-1)), JUDGED),
    (
        "mixed targets",
        linear,
        lambda m: (lambda z: 0.7 * F.cross_entropy(z, Y) + 0.3 * F.cross_entropy(z, OTHER))(m(X.clone())),
        JUDGED,
    ),
    ("a sum of logits", linear, lambda m: m(X.clone()).sum(), JUDGED + UNCERTAIN),
    (
        "labels are an input",
        lambda: Gives(nn.Linear(6, 5), lambda z, labels=None: z + F.one_hot(labels, 5)),
        lambda m: F.softplus(-JUDGE(m(X.clone(), labels=Y))).mean(),
        JUDGED + UNCERTAIN,
    ),
    (
        "targets of another loss",
        lambda: Gives(nn.Linear(6, 5), lambda z, targets=None: (z, F.mse_loss(z, F.one_hot(targets, 5).float()))),
        lambda m: m(X.clone(), targets=Y)[1],
        JUDGED + UNCERTAIN,
    ),
    (
        "a code's logvar",
        lambda: linear(6, lambda z: {"recon": z[:, :2], "mu": z[:, 2:4], "logvar": z[:, 4:]}),
        lambda m: (lambda o: o["recon"].square().mean() + (o["mu"].square() + o["logvar"].exp() - o["logvar"]).mean())(
            m(X.clone())
        ),
        JUDGED + UNCERTAIN,
    ),
    (
        "density",
        lambda: linear(4, lambda z: {"rgb": z[:, :3].sigmoid(), "sigma": z[:, 3:].exp()}),
        lambda m: sum(v.square().mean() for v in m(X.clone()).values()),
        JUDGED + UNCERTAIN,
    ),
    (
        "alpha of a matte",
        lambda: linear(4, lambda z: {"colour": z[:, :3], "alpha": z[:, 3:].sigmoid()}),
        lambda m: sum(v.square().mean() for v in m(X.clone()).values()),
        JUDGED + UNCERTAIN,
    ),
    (
        "noise levels",
        lambda: linear(2, lambda z: {"pred": z, "sigma": torch.full((48, 2), 80.0)}),
        lambda m: nn.MSELoss()(m(X.clone())["pred"], X[:, :2]),
        JUDGED + UNCERTAIN,
    ),
    (
        "negative variances",
        lambda: linear(2, lambda z: {"mean": z[:, :1], "variance": z[:, 1:] - 9}),
        lambda m: m(X.clone())["mean"].mean(),
        ("uncertainty_total/", "uncertainty_aleatoric/", "overview/aleatoric"),
    ),
    (
        "heads that are stacked",
        lambda: Listed(lambda z, g: torch.stack(z, 1)),
        lambda m: F.cross_entropy(m(X.clone()).flatten(0, 1), Y.repeat_interleave(3)),
        ("uncertainty_epistemic", "overview/epistemic"),
    ),
    (
        "experts behind a gate of zeros",
        lambda: Listed(lambda z, g: sum(g[:, i : i + 1] * p for i, p in enumerate(z))),
        lambda m: F.cross_entropy(m(X.clone()), Y),
        ("uncertainty_epistemic", "overview/epistemic"),
    ),
    ("terms of a sum", lambda: Listed(lambda z, g: sum(z), 1), lambda m: nn.MSELoss()(m(X.clone()), NUMBER), UNCERTAIN),
    (
        "the largest of several",
        lambda: Listed(lambda z, g: torch.stack(z).amax(0)),
        lambda m: F.cross_entropy(m(X.clone()), Y),
        ("uncertainty_epistemic", "overview/epistemic"),
    ),
    (
        "members in the batch",
        lambda: Listed(lambda z, g: torch.cat(z)),
        lambda m: F.cross_entropy(m(X.clone()), Y.repeat(3)),
        UNCERTAIN,
    ),
    ("two tasks by an attribute", Switched, both_tasks, ("uncertainty_epistemic", "overview/epistemic")),
    ("averaged weights", linear, averaged, ("uncertainty_epistemic", "overview/epistemic")),
    (
        "one pass twice",
        linear,
        lambda m: (lambda x: F.cross_entropy(m(x), Y) + F.cross_entropy(m(x), Y))(X.clone()),
        ("uncertainty_epistemic", "overview/epistemic"),
    ),
    (
        "a mixture of normals",
        lambda: linear(
            6,
            lambda z: distributions.MixtureSameFamily(
                distributions.Categorical(logits=z[:, :2]), distributions.Normal(z[:, 2:4], z[:, 4:].exp())
            ),
        ),
        lambda m: -m(X.clone()).log_prob(NUMBER[:, 0]).mean(),
        ("uncertainty_epistemic", "overview/epistemic"),
    ),
    (
        "a Laplace distribution",
        lambda: linear(2, lambda z: distributions.Laplace(z[:, :1], z[:, 1:].exp())),
        lambda m: -m(X.clone()).log_prob(NUMBER).mean(),
        ("calibration/coverage", "uncertainty_epistemic"),
    ),
    ("numbers without a variance", lambda: linear(1), lambda m: nn.MSELoss()(m(X.clone()), NUMBER), JUDGED + UNCERTAIN),
]


class Seen(NamedTuple):
    """Last values by tag, and what was said."""

    values: dict[str, float]
    said: str


def seen(model: nn.Module, step: Callable[[Any], Tensor]) -> Seen:
    writer, optimizer = MemoryWriter(), torch.optim.SGD(model.parameters(), lr=0.0)
    probes = [torchprobe.Uncertainty(), torchprobe.Calibration()]
    with torchprobe.instrument(model, writer=writer, probes=probes, every=1, rules=[]) as session:
        for _ in range(3):
            step(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    return Seen({tag: writer.value(tag) for tag in writer.tags() if writer.scalars(tag)}, session.summary())


@pytest.mark.parametrize(("name", "make", "step", "absent"), TREACHEROUS, ids=[row[0] for row in TREACHEROUS])
def test_of_other_programs_nothing_is_claimed(name, make, step, absent):
    torch.manual_seed(0)
    got = seen(make(), step)
    assert [tag for tag in got.values if tag.startswith(absent)] == []
