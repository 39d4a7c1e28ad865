"""More small programs, by what deceives in them: axes, members, names, targets of one's own making, rows of choice.

Each row is as in `test_corpus`: of what is known the right numbers, of the rest none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributions, nn

import torchprobe
from tests.capture.predictions.test_corpus import (
    JUDGED,
    MANY,
    MAPS,
    NUMBER,
    OTHER,
    UNCERTAIN,
    Gives,
    Listed,
    X,
    Y,
    accuracy,
    answers,
    entropy,
    language,
    linear,
    says,
    seen,
)
from torchprobe.testing import MemoryWriter

torch.manual_seed(11)
WORDS, NEXT = torch.randint(0, 9, (6, 8)), torch.randint(0, 9, (6, 8))
TASKS = torch.stack((Y, OTHER, Y.flip(0)), 1)
PLACES = torch.randint(0, 4, (3, 5, 7))
EPISTEMIC = ("uncertainty_epistemic", "overview/epistemic")


def of(z: Callable[[Any], Tensor], y: Tensor, p: Callable[[Tensor], Tensor] = lambda z: z.softmax(-1)) -> Any:
    """Accuracy and entropy, classes last."""
    return lambda m: {
        "calibration/accuracy": accuracy(z(m), y),
        "uncertainty_total/root": entropy(p(z(m))),
    }


def of_yes(z: Callable[[Any], Tensor], y: Tensor) -> Any:
    return lambda m: {
        "calibration/accuracy": ((z(m) > 0) == (y > 0)).double().mean().item(),
        "uncertainty_total/root": entropy(answers(z(m).sigmoid())),
    }


class Translator(nn.Module):
    """Is fed what it has to say, one step late."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target, self.out = nn.Embedding(10, 8), nn.Embedding(10, 8), nn.Linear(8, 10)

    def forward(self, words: Tensor, labels: Tensor | None = None, target: Tensor | None = None) -> Any:
        given = labels if target is None else target
        late = torch.zeros_like(given)
        late[:, 1:] = given[:, :-1].clamp(min=0)
        z = self.out(self.target(late) + self.source(words).mean(1, keepdim=True))
        return z if labels is None else {"loss": F.cross_entropy(z.flatten(0, 1), labels.flatten()), "logits": z}


class Stateful(nn.Module):
    """Leaks what it saw into its next answer, as a spiking network does."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.kept = nn.Linear(6, 5), [torch.zeros(48, 5)]

    def forward(self, x: Tensor) -> Tensor:
        self.kept[0] = 0.5 * (self.kept[0] + self.net(x)).detach()
        return self.net(x) + self.kept[0]


class Keeping(nn.Module):
    """Draws as dropout does, and keeps something beside its weights."""

    def __init__(self, kept: str) -> None:
        super().__init__()
        self.heads, self.drop = nn.ModuleList(nn.Linear(6, 5) for _ in range(2)), nn.Dropout(0.3)
        self.memory: Tensor | None = None
        self.options, self.kept = {"task": 0}, kept
        self.register_buffer("leaked", torch.zeros(48, 5))
        self.register_buffer("task", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        z = self.heads[int(self.task) + self.options["task"]](self.drop(x))
        if self.kept == "memory":
            z = z + (0.0 if self.memory is None else self.memory)
            self.memory = 0.5 * z.detach()
        elif self.kept == "leaked":
            z = z + self.leaked
            self.leaked.copy_(0.5 * z.detach())
        return z


def keeping_twice(m: Any) -> Tensor:
    m.memory, x = None, X.clone()
    loss = F.cross_entropy(m(x), Y)
    if m.kept == "task":
        m.task.fill_(1)
    elif m.kept == "options":
        m.options["task"] = 1
    loss = loss + F.cross_entropy(m(x), OTHER)
    m.task.zero_()
    m.options["task"] = 0
    return loss


class Returns(nn.Module):
    """Its own loss of its labels, and its logits."""

    def __init__(self, loss: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.loss = nn.Linear(6, 5), loss

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.net(x)
        return self.loss(z), z


def maps(give: Callable[[Tensor], Tensor] = lambda z: z, out: int = 4) -> Gives:
    return Gives(nn.Conv2d(2, out, 1), give)


def both() -> Callable[[], nn.Module]:
    return lambda: linear(10, lambda z: (z[:, :5] * 1, z[:, 5:] * 1))


def dropped() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 5))


PADDED = NEXT.where(torch.arange(8) < 6, -100)
ON_PIXELS = torch.randint(0, 2, (3, 4, 5, 7)).float()
ON_WORDS = torch.randint(0, 2, (6, 8, 9)).float()
LEVELS = (Y[:, None] > torch.arange(4)).float()
HALF = Y.where(torch.arange(48) % 2 > 0, -100)

HARD = lambda z: F.cross_entropy(z, Y, reduction="none")  # noqa: E731 - of each example
FIRST = torch.arange(48) % 3 == 0


def of_rows(rows: Callable[[Tensor], Any]) -> Any:
    return lambda m: (lambda z: {"calibration/accuracy": accuracy(z[rows(z)], Y[rows(z)])})(m(X)[1])


def of_domains(m: Any) -> Tensor:
    """Each output has rows of its own."""
    a, b = m(X.clone())
    return F.cross_entropy(a, Y.where(FIRST, -100)) + F.cross_entropy(b, Y.where(~FIRST, -100))


KNOWN = [
    says(
        "a returned loss, masked",
        lambda: Returns(lambda z: HARD(z)[FIRST].sum() / 16),
        lambda m: m(X.clone())[0],
        of_rows(lambda z: FIRST),
    ),
    says(
        "a returned loss of the hardest",
        lambda: Returns(lambda z: HARD(z).topk(16).values.mean()),
        lambda m: m(X.clone())[0],
        of_rows(lambda z: HARD(z).topk(16).indices),
    ),
    says(
        "a returned loss with a penalty",
        lambda: Returns(lambda z: F.cross_entropy(z, Y) + 0.1 * z.square().mean()),
        lambda m: m(X.clone())[0],
        of_rows(lambda z: slice(None)),
    ),
    says(
        "outputs for rows of their own",
        both(),
        of_domains,
        lambda m: {
            f"calibration/accuracy{name}": accuracy(z[rows], Y[rows])
            for name, z, rows in zip(("", "/1"), m(X), (FIRST, ~FIRST), strict=True)
        },
    ),
    *(
        says(
            f"{dtype}, very sure",
            lambda dtype=dtype: linear(give=lambda z: z.to(dtype), scale=20.0),
            lambda m: F.cross_entropy(m(X.clone()), Y),
            lambda m: {"calibration/accuracy": accuracy(m(X), Y), "calibration/count": 48.0},
        )
        for dtype in (torch.float16, torch.bfloat16)
    ),
    says(
        "a decoder's labels",
        Translator,
        lambda m: m(WORDS.clone(), labels=PADDED)["loss"],
        lambda m: (
            of(lambda m: m(WORDS, labels=PADDED)["logits"][PADDED != -100], PADDED[PADDED != -100])(m)
            | {"uncertainty_total/root": entropy(m(WORDS, labels=PADDED)["logits"].softmax(-1))}
        ),
    ),
    says(
        "an argument target that is an input",
        Translator,
        lambda m: F.cross_entropy(m(WORDS.clone(), target=NEXT).flatten(0, 1), NEXT.roll(1, 0).flatten()),
        of(lambda m: m(WORDS, target=NEXT), NEXT.roll(1, 0)),
    ),
    says(
        "classes of pixels last",
        lambda: maps(lambda z: z.movedim(1, -1)),
        lambda m: F.cross_entropy(m(MAPS.clone()).flatten(0, -2), PLACES.flatten()),
        of(lambda m: m(MAPS), PLACES),
    ),
    says(
        "as many steps as classes",
        language,
        lambda m: F.cross_entropy(m(WORDS.clone().repeat(1, 2)[:, :9]).transpose(1, 2), NEXT.repeat(1, 2)[:, :9]),
        of(lambda m: m(WORDS.repeat(1, 2)[:, :9]), NEXT.repeat(1, 2)[:, :9]),
    ),
    says(
        "answers of every pixel",
        maps,
        lambda m: F.binary_cross_entropy_with_logits(m(MAPS.clone()), ON_PIXELS),
        of_yes(lambda m: m(MAPS), ON_PIXELS),
    ),
    says(
        "answers of every word",
        language,
        lambda m: F.binary_cross_entropy_with_logits(m(WORDS.clone()), ON_WORDS),
        of_yes(lambda m: m(WORDS), ON_WORDS),
    ),
    says(
        "nothing but background",
        maps,
        lambda m: F.cross_entropy(m(MAPS.clone()), 0 * PLACES),
        of(lambda m: m(MAPS).movedim(1, -1), 0 * PLACES),
    ),
    says(
        "tasks side by side",
        lambda: Listed(lambda z, g: torch.stack(z, 1)),
        lambda m: F.cross_entropy(m(X.clone()).transpose(1, 2), TASKS),
        of(lambda m: m(X), TASKS),
    ),
    says(
        "ordered classes by levels",
        lambda: linear(4),
        lambda m: F.binary_cross_entropy_with_logits(m(X.clone()), LEVELS),
        of_yes(lambda m: m(X), LEVELS),
    ),
    says(
        "margins of answers",
        lambda: linear(5),
        lambda m: F.soft_margin_loss(m(X.clone()), 2 * MANY - 1),
        of_yes(lambda m: m(X), MANY),
    ),
    says(
        "the hardest examples",
        linear,
        lambda m: F.cross_entropy(m(X.clone()), Y, reduction="none").topk(16).values.mean(),
        lambda m: (lambda z, i: {"calibration/accuracy": accuracy(z[i], Y[i])})(
            m(X), F.cross_entropy(m(X), Y, reduction="none").topk(16).indices
        ),
    ),
    says(
        "one-hot rows, written out",
        linear,
        lambda m: -(F.one_hot(Y, 5) * m(X.clone()).log_softmax(-1)).sum(1).mean(),
        of(lambda m: m(X), Y),
    ),
    says(
        "evidence that is logits",
        lambda: linear(5, lambda z: {"evidence_logits": z}),
        lambda m: F.cross_entropy(m(X.clone())["evidence_logits"], Y),
        of(lambda m: m(X)["evidence_logits"], Y),
    ),
    says(
        "entropies beside logits",
        lambda: linear(5, lambda z: {"logits": z, "entropy": distributions.Categorical(logits=z).entropy()}),
        lambda m: F.cross_entropy(m(X.clone())["logits"], Y),
        lambda m: {"uncertainty_total/root": m(X)["entropy"].double().mean().item()},
    ),
    says(
        "mean and log_std, written out",
        lambda: linear(2, lambda z: (z[:, :1], z[:, 1:])),
        lambda m: (lambda a, s: (s + ((a - NUMBER) / s.exp()).square() / 2).mean())(*m(X.clone())),
        lambda m: {
            "uncertainty_aleatoric/root": (2 * m(X)[1]).exp().double().mean().item(),
            "calibration/coverage_90": (((m(X)[0] - NUMBER).abs() <= 1.6448536 * m(X)[1].exp()).double().mean().item()),
        },
    ),
    says(
        "a reconstruction's variance",
        lambda: linear(12, lambda z: {"recon_mean": z[:, :6], "recon_var": z[:, 6:].exp()}),
        lambda m: (lambda o: F.gaussian_nll_loss(o["recon_mean"], X.flip(1), o["recon_var"]))(m(X.clone())),
        lambda m: {"uncertainty_aleatoric/root": m(X)["recon_var"].double().mean().item()},
    ),
    says(
        "a real and a generated batch",
        lambda: linear(1),
        lambda m: (
            F.binary_cross_entropy_with_logits(m(X.clone()), torch.ones(48, 1))
            + F.binary_cross_entropy_with_logits(m(-X), torch.zeros(48, 1))
        ),
        lambda m: {"calibration/accuracy": torch.cat((m(X) > 0, m(-X) <= 0)).double().mean().item()},
    ),
]


def best_of_each(m: Any) -> Tensor:
    x = X.clone()
    losses = [F.cross_entropy(m(x), Y, reduction="none") for _ in range(3)]
    return torch.stack(losses).amin(0).mean()


def best_of_all(m: Any) -> Tensor:
    x = X.clone()
    return torch.stack([F.cross_entropy(m(x), Y) for _ in range(3)]).min()


def twice(m: Any) -> Tensor:
    m.kept[0] = torch.zeros(48, 5)
    x = X.clone()
    return F.cross_entropy(m(x), Y) + F.cross_entropy(m(x), Y)


def own_labels(m: Any) -> Tensor:
    z = m(X.clone())
    return F.cross_entropy(z, z.detach().argmax(-1))


def sure_own_labels(m: Any) -> Tensor:
    z = m(X.clone())
    sure = z.detach().softmax(-1).amax(-1) > 0.3
    return (F.cross_entropy(z, z.detach().argmax(-1), reduction="none") * sure).mean()


def by_loss(choose: Callable[[Tensor], Tensor]) -> Callable[[Any], Tensor]:
    """Of two outputs the one that the losses choose."""
    return lambda m: choose(torch.stack([F.cross_entropy(z, Y, reduction="none") for z in m(X.clone())])).mean()


def best_of_stacked(m: Any) -> Tensor:
    z = m(X.clone())
    return F.cross_entropy(z.flatten(0, 1), Y.repeat_interleave(3), reduction="none").view(48, 3).amin(1).mean()


def rewarded(m: Any) -> Tensor:
    law = distributions.Categorical(logits=m(X.clone()))
    return -law.log_prob(law.sample()).mean()


def few_own_labels(m: Any) -> Tensor:
    z = m(torch.randn(4, 6))
    return F.cross_entropy(z, z.detach().argmax(-1))


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    return ((mean.square() + log_variance.exp() - 1 - log_variance) / 2).sum(1).mean()


IS, KEPT = torch.arange(2)[:, None], ("memory", "leaked", "task", "options")
DECEIVING: list[tuple[str, Callable[[], nn.Module], Callable[[Any], Tensor], tuple[str, ...]]] = [
    (
        "members side by side",
        lambda: Listed(lambda z, g: torch.stack(z, 1)),
        lambda m: F.cross_entropy(m(X.clone()).transpose(1, 2), Y[:, None].expand(-1, 3)),
        UNCERTAIN,
    ),
    (
        "members side by side, classes second",
        lambda: Listed(lambda z, g: torch.stack(z, -1)),
        lambda m: F.cross_entropy(m(X.clone()), Y[:, None].expand(-1, 3)),
        UNCERTAIN,
    ),
    (
        "members of one answer side by side",
        lambda: linear(5),
        lambda m: F.binary_cross_entropy_with_logits(m(X.clone()), MANY[:, :1].expand(-1, 5)),
        UNCERTAIN,
    ),
    ("a state between passes", Stateful, twice, EPISTEMIC),
    ("the best pass of each example", dropped, best_of_each, JUDGED),
    ("the best pass of all", dropped, best_of_all, JUDGED),
    ("its own likeliest classes", linear, own_labels, JUDGED),
    ("its own likeliest classes, a few", linear, few_own_labels, JUDGED),
    ("a sample, always rewarded", linear, rewarded, JUDGED),
    ("the best of two outputs", both(), by_loss(lambda x: x.amin(0)), JUDGED),
    ("the worst of two outputs", both(), by_loss(lambda x: x.where(x.argmax(0) == IS, 0.0).sum(0)), JUDGED),
    ("the best of each example", lambda: Listed(lambda z, g: torch.stack(z, 1)), best_of_stacked, JUDGED),
    (
        "some columns of a returned loss",
        lambda: Returns(lambda z: F.cross_entropy(z[:, 1:], Y % 4)),
        lambda m: m(X)[0],
        JUDGED,
    ),
    *((f"what is kept: {kept}", lambda kept=kept: Keeping(kept), keeping_twice, EPISTEMIC) for kept in KEPT),
    ("half ignored, and very sure", lambda: linear(scale=400.0), lambda m: F.cross_entropy(m(X.clone()), HALF), JUDGED),
    (
        "a code's log_var",
        lambda: linear(14, lambda z: {"recon": z[:, :6], "mu": z[:, 6:10], "log_var": z[:, 10:]}),
        lambda m: (lambda o: F.mse_loss(o["recon"], X) + divergence(o["mu"], o["log_var"]))(m(X.clone())),
        UNCERTAIN + JUDGED,
    ),
    (
        "a code's log_var, and MSELoss",
        lambda: linear(14, lambda z: {"recon": z[:, :6], "mu": z[:, 6:10], "log_var": z[:, 10:]}),
        lambda m: (lambda o: nn.MSELoss()(o["recon"], X) + divergence(o["mu"], o["log_var"]))(m(X.clone())),
        UNCERTAIN + JUDGED,
    ),
    (
        "a code's variance",
        lambda: linear(14, lambda z: {"recon": z[:, :6], "mu": z[:, 6:10], "var": z[:, 10:].exp()}),
        lambda m: (lambda o: F.mse_loss(o["recon"], X) + divergence(o["mu"], o["var"].log()))(m(X.clone())),
        UNCERTAIN + JUDGED,
    ),
    (
        "a code alone",
        lambda: linear(8, lambda z: (z[:, :4], z[:, 4:])),
        lambda m: divergence(*m(X.clone())),
        UNCERTAIN + JUDGED,
    ),
    (
        "weights of tasks",
        lambda: linear(2, lambda z: {"pred": z, "variances": torch.ones(2)}),
        lambda m: F.mse_loss(m(X.clone())["pred"], X[:, :2]),
        UNCERTAIN,
    ),
    (
        "an entropy that is a penalty",
        lambda: linear(5, lambda z: {"logits": z, "entropy": -distributions.Categorical(logits=z).entropy().mean()}),
        lambda m: (lambda o: F.cross_entropy(o["logits"], Y) + 0.1 * o["entropy"])(m(X.clone())),
        UNCERTAIN,
    ),
    (
        "directions",
        lambda: linear(2, lambda z: distributions.VonMises(z[:, :1], z[:, 1:].exp())),
        lambda m: -m(X.clone()).log_prob(NUMBER).mean(),
        UNCERTAIN + JUDGED,
    ),
    (
        "a law without a variance",
        lambda: linear(2, lambda z: distributions.StudentT(1.5, z[:, :1], z[:, 1:].exp())),
        lambda m: -m(X.clone()).log_prob(NUMBER).mean(),
        ("uncertainty_total/", "uncertainty_aleatoric/", "calibration/coverage"),
    ),
    (
        "a likelihood with weights that are not learnt",
        lambda: linear(2, lambda z: (z[:, :1], z[:, 1:].exp())),
        lambda m: (lambda a, v: (v.detach().sqrt() * (v.log() + (a - NUMBER).square() / v)).mean())(*m(X.clone())),
        UNCERTAIN + JUDGED,
    ),
    (
        "quantiles",
        lambda: linear(3),
        lambda m: (lambda e: torch.maximum(0.1 * e, -0.9 * e).mean())(NUMBER - m(X.clone())),
        UNCERTAIN + JUDGED,
    ),
    (
        "focal",
        linear,
        lambda m: (lambda c: ((1 - (-c).exp()).square() * c).mean())(
            F.cross_entropy(m(X.clone()), Y, reduction="none")
        ),
        UNCERTAIN + JUDGED,
    ),
    (
        "two answers of one column each",
        lambda: linear(7),
        lambda m: (lambda z: F.cross_entropy(z[:, :3], Y % 3) + F.cross_entropy(z[:, 3:], OTHER % 4))(m(X.clone())),
        UNCERTAIN + JUDGED,
    ),
    (
        "against other classes, too",
        linear,
        lambda m: (lambda z: F.cross_entropy(z, Y) - 0.3 * F.cross_entropy(z, OTHER))(m(X.clone())),
        UNCERTAIN + JUDGED,
    ),
    (
        "logits adjusted outside",
        linear,
        lambda m: nn.CrossEntropyLoss()(m(X.clone()) + torch.arange(1.0, 6.0).log(), Y),
        UNCERTAIN + JUDGED,
    ),
    (
        "a margin of angles",
        lambda: linear(5, lambda z: F.normalize(z, dim=-1)),
        lambda m: nn.CrossEntropyLoss()(8 * (m(X.clone()) - 0.2 * F.one_hot(Y, 5)), Y),
        UNCERTAIN + JUDGED,
    ),
    (
        "half of a batch by another loss",
        linear,
        lambda m: (lambda z: F.cross_entropy(z[:24], Y[:24]) + F.mse_loss(z[24:], MANY[24:]))(m(X.clone())),
        UNCERTAIN + JUDGED,
    ),
    (
        "words aligned by CTC",
        language,
        lambda m: F.ctc_loss(
            m(WORDS.clone()).log_softmax(-1).transpose(0, 1),
            NEXT[:, :3].clamp(min=1),
            torch.full((6,), 8),
            torch.full((6,), 3),
        ),
        UNCERTAIN + JUDGED,
    ),
    (
        "two policies",
        both(),
        lambda m: sum(-(distributions.Categorical(logits=z).log_prob(OTHER) * (Y + 1.0)).mean() for z in m(X.clone())),
        UNCERTAIN + JUDGED,
    ),
    ("the sum of two outputs", both(), lambda m: F.cross_entropy(sum(m(X.clone())), Y), UNCERTAIN + JUDGED),
    (
        "two views that are compared",
        both(),
        lambda m: (lambda a, b: nn.CrossEntropyLoss()(a @ b.T, torch.arange(48)))(*m(X.clone())),
        UNCERTAIN + JUDGED,
    ),
    (
        "a student and its teacher",
        both(),
        lambda m: (lambda a, b: F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="batchmean"))(*m(X.clone())),
        UNCERTAIN + JUDGED,
    ),
    (
        "a mixture side by side",
        lambda: Listed(lambda z, g: torch.stack(z, 1)),
        lambda m: F.nll_loss(m(X.clone()).softmax(-1).mean(1).log(), Y),
        UNCERTAIN + JUDGED,
    ),
    (
        "pictures, by squared error",
        lambda: maps(torch.sigmoid),
        lambda m: F.mse_loss(m(MAPS.clone()), ON_PIXELS),
        UNCERTAIN + JUDGED,
    ),
    (
        "grey pictures",
        maps,
        lambda m: F.binary_cross_entropy_with_logits(m(MAPS.clone()), ON_PIXELS * 0.5 + 0.2),
        UNCERTAIN + JUDGED,
    ),
    (
        "ranks of pairs",
        lambda: linear(1),
        lambda m: (lambda z: nn.CrossEntropyLoss()(torch.cat((z[:24], z[24:]), 1), torch.zeros(24).long()))(
            m(X.clone())
        ),
        UNCERTAIN + JUDGED,
    ),
]


@pytest.mark.parametrize(("name", "make", "step", "absent"), DECEIVING, ids=[row[0] for row in DECEIVING])
def test_what_is_not_known_is_not_claimed_and_said(name, make, step, absent):
    torch.manual_seed(0)
    got = seen(make(), step)
    assert [tag for tag in got.values if tag.startswith(absent)] == []
    assert "not recorded" in got.said or "nothing captured" in got.said or absent == EPISTEMIC


def test_own_labels_are_told_once_there_were_enough():
    torch.manual_seed(0)
    said = seen(linear(), sure_own_labels).said
    assert "the model's own likeliest classes" in said


STACKED = {
    "mean of logits": lambda z: F.cross_entropy(z.mean(0), Y),
    "mean of probabilities": lambda z: F.nll_loss(z.softmax(-1).mean(0).log(), Y),
    "each": lambda z: F.cross_entropy(z.flatten(0, 1), Y.repeat(3)),
}
NOT_STACKED = {
    "other targets": (lambda z: F.cross_entropy(z.transpose(1, 2), TASKS.T)),
    "a policy of the mean": lambda z: -(z.mean(0).log_softmax(-1)[torch.arange(48), Y] * (Y + 1.0)).mean(),
    "a sum": lambda z: F.cross_entropy(z.sum(0), Y),
}


def declared(loss: Callable[[Tensor], Tensor]) -> tuple[dict[str, float], Tensor]:
    torch.manual_seed(0)
    model, writer = Listed(lambda z, g: torch.stack(z)), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probes = [torchprobe.Uncertainty(sample_dim=0), torchprobe.Calibration()]
    with torchprobe.instrument(model, writer=writer, probes=probes, every=1, rules=[]):
        for _ in range(2):
            loss(model(X.clone())).backward()
            optimizer.step()
            optimizer.zero_grad()
    values = {tag: writer.value(tag) for tag in writer.tags() if writer.scalars(tag)}
    return values, model(X).detach().double().softmax(-1)


@pytest.mark.parametrize("loss", STACKED.values(), ids=STACKED)
def test_members_that_the_user_declares_are_judged_by_their_mean(loss):
    values, p = declared(loss)
    expected = {
        "calibration/accuracy": accuracy(p.mean(0), Y),
        "calibration/nll": -p.mean(0)[torch.arange(48), Y].log().mean().item(),
        "uncertainty_total/root": entropy(p.mean(0)),
        "uncertainty_aleatoric/root": entropy(p),
        "uncertainty_epistemic/root": entropy(p.mean(0)) - entropy(p),
    }
    assert {tag: values.get(tag, math.nan) for tag in expected} == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("loss", NOT_STACKED.values(), ids=NOT_STACKED)
def test_members_whose_targets_differ_are_none(loss):
    values, _ = declared(loss)
    assert [tag for tag in values if tag.startswith("calibration/")] == []
