"""Attention: entropy, logits, sinks and distance of every head, and pictures of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.arguments import check_count
from torchprobe.pictures import grid, heat_map
from torchprobe.probes.base import InValidation, Probe, Reporter, Way
from torchprobe.probes.schedule import Schedule, as_schedule
from torchprobe.records import Value
from torchprobe.statistics import attention

SINK_THRESHOLD = 0.3  # Gu et al. 2024: a head whose first key takes more than this is a sink head

COLLAPSE = 0.1  # nats: a head whose mean entropy is below this attends to one key

_TO_READ = "to have attention that is written out read inside compiled graphs, too"
_COLLAPSED = f"1 when the mean entropy of a head is below {COLLAPSE} nats, else 0."
_UNITS = {"entropy": ", nats", "distance": ", tokens"}
_EXACT = "exact: all query rows"
_TAG_OF = {  # statistic of a head -> tag of its mean over heads
    "entropy": "attention_entropy",
    "normalized_entropy": "attention_entropy_normalized",
    "max_probability": "attention_max_prob",
    "sink": "attention_sink",
    "distance": "attention_distance",
}
_MEANINGS = {
    "attention_entropy": "Entropy of a query's attention in nats, mean over queries, then over heads",
    "attention_entropy_normalized": "Entropy over the log of the number of visible keys, mean over queries and heads",
    "attention_entropy_min": "Mean entropy of the head where it is smallest, in nats",
    "attention_max_logit": "Largest logit after scale and mask, before the softmax",
    "attention_max_prob": "Largest probability of a query, mean over queries and heads",
    "attention_sink": "Probability on the first visible key, mean over queries and heads",
    "attention_sink_heads": f"Share of heads whose mean probability on the first visible key exceeds {SINK_THRESHOLD}",
    "attention_distance": "Distance in tokens between a query and the keys it attends to, mean over queries and heads",
    "attention_heads": "A statistic of every head: layers down, heads across",
    "attention_heatmap": "The same as a picture",
}


def _descriptions(how: str) -> dict[str, str]:
    bound = how if how == _EXACT else f"{how}: a lower bound"
    texts = {
        group: f"{text} ({bound if group == 'attention_max_logit' else how})." for group, text in _MEANINGS.items()
    }
    pooled = "Attention of the first sequence, pooled to at most 128 by 128 pixels, which the axes count"
    return {**texts, "attention_map": f"{pooled}; every row adds up to 1."}


class Attention(Probe):
    """Statistics of every attention of the model, found where it is computed, per head.

    rows: query rows a head to read at each call, spread over all sequences of the batch; all of them when there
    are no more, and for "all". Fewer rows than there are make the means samples, and the largest logit a lower
    bound: the tags' descriptions say which. maps_every: cadence of the pictures, by default the first and every tenth
    sampled step; they show all heads as a heat map for each statistic, and attention itself, pooled, for the first
    sequence of the batch in the first `map_layers` attentions. eval: also in validation.

    compiled: what becomes of attention that is written out (product, softmax, product) inside a graph of
    `torch.compile`. "say": the summary names it; it is not read, and graphs are those that they are without. "read": an
    operator in the graph of sampled steps reads the input of each attention's softmax; what cannot be read is named.

    Cost: a matrix product of the chosen rows with all keys, on sampled steps; compiled="read": logits are put into
    memory, with which Inductor does not fuse the attention, and weights may differ in their last bits.
    Raises TypeError or ValueError for an argument of another kind.
    """

    source: ClassVar[str] = "attention"
    found_everywhere: ClassVar[bool] = False
    fields: ClassVar[tuple[str, ...]] = (*attention.FIELDS, "sampled")
    combines_many: ClassVar[bool] = True
    over_shards: ClassVar[Way] = "append"  # tensor parallel ranks have some of the heads each
    descriptions: Mapping[str, str] = _descriptions(_EXACT)

    def __init__(
        self,
        every: int | Schedule | None = None,
        *,
        rows: int | Literal["all"] = 512,
        maps_every: int | Schedule | None = None,
        map_layers: int = 4,
        eval: bool = False,
        compiled: Literal["say", "read"] = "say",
    ) -> None:
        super().__init__(every)
        if compiled not in ("say", "read"):
            raise ValueError(f'compiled={compiled!r}: takes "say" or "read": write compiled="read" {_TO_READ}')
        self.compiled = compiled
        self.rows = rows if rows == "all" else check_count("rows", rows, of="rows")
        self.map_schedule = None if maps_every is None else as_schedule("maps_every", maps_every)
        self.map_layers = check_count("map_layers", map_layers)
        self.eval = eval

    @property
    def in_validation(self) -> InValidation:
        """The first batch, if `eval`."""
        return "first" if self.eval else "never"

    def reporter(self) -> AttentionReporter:
        """Also draws the heads of all layers, where a picture is due."""
        return AttentionReporter(self)

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """A head's rows of two batches together."""
        both = attention.combine(a[..., :-1], b[..., :-1])
        return torch.cat((both, torch.maximum(a[..., -1:], b[..., -1:])), dim=-1)

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """Names repeat: a row for each head. Per layer, the heads of all layers, and the overview."""
        layers = {name: _summaries(rows[[n == name for n in names], :-1]) for name in dict.fromkeys(names)}
        for name, heads in layers.items():
            yield from _layer(name, heads)
        for statistic, matrix in _matrices(list(layers.values())):
            yield f"attention_heads/{statistic}", matrix.astype(np.float32)
        entropies = [head["entropy"] for heads in layers.values() for head in heads if "entropy" in head]
        if entropies:
            yield "overview/attention_entropy_min", min(entropies)
        logits = [head["max_logit"] for heads in layers.values() for head in heads if "max_logit" in head]
        if logits:  # of weights that are read as they are used none may be known
            yield "overview/attention_max_logit", max(logits)


class AttentionWeights(Attention):
    """Statistics of the probabilities of an attention: as `Attention` has them, but for its logits.

    An entry of 0 is a key that is not visible. Rows are taken relative to their sum, which dropout changes.
    """

    descriptions: Mapping[str, str] = {**Attention.descriptions, "attention_collapse": _COLLAPSED}

    def __init__(self) -> None:
        super().__init__(1)

    def compute(self, tensor: Tensor) -> Tensor:
        """tensor: (batch, heads, queries, keys), floating. Returns (heads, len(fields)). Takes a log of every entry."""
        wide = tensor if tensor.dtype == torch.float64 else tensor.float()
        source = attention.Logits(wide.log())
        rows = attention.compute(source, self.rows, None)
        sampled = rows.new_full((len(rows), 1), float(attention.is_sampled(source, self.rows)))
        return torch.cat((rows, sampled), dim=1)

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """Names repeat: a row for each head."""
        for tag, value in super().report_all(names, rows):
            if "max_logit" not in tag:  # which probabilities do not tell
                yield tag, value
            if tag.startswith("attention_entropy_min/") and isinstance(value, float):
                yield tag.replace("entropy_min", "collapse", 1), float(value < COLLAPSE)


class AttentionReporter(Reporter):
    """Attention in one session: whether all of its query rows are read."""

    def __init__(self, probe: Attention) -> None:
        super().__init__(probe)
        self._rows = probe.rows
        self.heat_maps = AttentionHeatMaps(probe)
        self.beside = (self.heat_maps,)

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """The probe's; the tags' descriptions say so once rows were sampled."""
        if rows[:, -1].any():
            self.descriptions = {**self.descriptions, **_descriptions(f"sampled: {self._rows} query rows a head")}
        yield from super().report_all(names, rows)


class AttentionHeatMaps(Reporter):
    """Draws every statistic, layers down and heads across. Drawing takes the time of many records."""

    def __init__(self, probe: Attention) -> None:
        super().__init__(probe)
        self.descriptions = {}

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """The same rows as the probe's."""
        layers = [_summaries(rows[[n == name for n in names], :-1]) for name in dict.fromkeys(names)]
        for statistic, matrix in _matrices(layers):
            title = f"attention: {statistic.replace('_', ' ')}{_UNITS.get(statistic, '')}"
            yield f"attention_heatmap/{statistic}", heat_map(matrix, rows="layer", columns="head", title=title)


class AttentionMap:
    """Draws the heads of one attention; made once for each module and shape of map."""

    def __init__(self, module: str, height: int, width: int) -> None:
        self._module = module
        self._shape = (height, width)

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """One row a head: its pooled probabilities, flattened."""
        heads = list(rows.reshape(-1, *self._shape))
        titles = [f"head {i}" for i in range(len(heads))]
        axes, high = "queries down, keys across; yellow: that probability or more", _brightest(rows)
        yield f"attention_map/{self._module}", grid(heads, titles, title=self._module, axes=axes, high=high)


def _brightest(rows: NDArray[np.float64]) -> float:
    """Where the colours end: the first queries of a causal attention see few keys and would leave the rest dark."""
    seen = rows[rows > 0]
    return float(np.quantile(seen, 0.99)) if seen.size else 1.0


def _summaries(rows: NDArray[np.float64]) -> list[dict[str, float]]:
    return [attention.summarise(row) for row in rows.tolist()]


def _layer(name: str, heads: list[dict[str, float]]) -> Iterator[tuple[str, Value]]:
    for statistic, tag in _TAG_OF.items():
        values = [head[statistic] for head in heads if statistic in head]
        if values:
            yield f"{tag}/{name}", float(np.add.reduce(values) / len(values))  # as np.mean, in a third of its time
            if statistic == "entropy":
                yield f"attention_entropy_min/{name}", min(values)
            if statistic == "sink":
                yield f"attention_sink_heads/{name}", sum(value > SINK_THRESHOLD for value in values) / len(values)
    logits = [head["max_logit"] for head in heads if "max_logit" in head]
    if logits:
        yield f"attention_max_logit/{name}", max(logits)


def _matrices(layers: list[list[dict[str, float]]]) -> Iterator[tuple[str, NDArray[np.float64]]]:
    for statistic in (*_TAG_OF, "max_logit"):
        matrix = np.full((len(layers), max(map(len, layers))), np.nan)
        for i, heads in enumerate(layers):
            matrix[i, : len(heads)] = [head.get(statistic, np.nan) for head in heads]
        yield statistic, matrix
