"""Attention: entropy, logits, sinks and distance of every head, and pictures of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.pictures import grid, heat_map
from torchprobe.probes.base import Probe, Source, Way
from torchprobe.records import Value
from torchprobe.schedule import Schedule, as_schedule, check_count
from torchprobe.statistics import attention

SINK_THRESHOLD = 0.3  # Gu et al. 2024: a head whose first key takes more than this is a sink head

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


class Attention(Probe):
    """Statistics of every attention of the model, found where it is computed, per head.

    rows: query rows a head to read at each call, spread over all sequences of the batch; all of them when there
    are no more, and for "all". Fewer rows than there are make the means samples, and the largest logit a lower
    bound: the tags' descriptions say which. maps_every: cadence of the pictures, by default the first and every tenth
    sampled step; they show all heads as a heat map for each statistic, and attention itself, pooled, for the first
    sequence of the batch in the first `map_layers` attentions. eval: also in validation.

    Cost: a matrix product of the chosen rows with all keys, on sampled steps.
    """

    source: ClassVar[Source] = "attention"
    found_everywhere: ClassVar[bool] = False
    fields: ClassVar[tuple[str, ...]] = (*attention.FIELDS, "sampled")
    over_shards: ClassVar[Way] = "append"  # tensor parallel ranks have some of the heads each

    def __init__(
        self,
        every: int | Schedule | None = None,
        *,
        rows: int | Literal["all"] = 512,
        maps_every: int | Schedule | None = None,
        map_layers: int = 4,
        eval: bool = False,
    ) -> None:
        super().__init__(every)
        self.rows = rows if rows == "all" else check_count("rows", rows)
        self.map_schedule = None if maps_every is None else as_schedule("maps_every", maps_every)
        self.map_layers = check_count("map_layers", map_layers)
        self.eval = eval
        self.descriptions = _descriptions(_EXACT)

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """A head's rows of two batches together."""
        both = attention.combine(a[..., :-1], b[..., :-1])
        return torch.cat((both, torch.maximum(a[..., -1:], b[..., -1:])), dim=-1)

    def combine_rows(self, a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        """The same, all heads at once."""
        return self.combine(torch.from_numpy(a), torch.from_numpy(b)).numpy()

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """Names repeat: a row for each head. Per layer, the heads of all layers, and the overview."""
        if rows[:, -1].any():
            self.descriptions = _descriptions(f"sampled: {self.rows} query rows a head")
        layers = {name: _summaries(rows[[n == name for n in names], :-1]) for name in dict.fromkeys(names)}
        for name, heads in layers.items():
            yield from _layer(name, heads)
        for statistic, matrix in _matrices(list(layers.values())):
            yield f"attention_heads/{statistic}", matrix.astype(np.float32)
        entropies = [head["entropy"] for heads in layers.values() for head in heads if "entropy" in head]
        if entropies:
            yield "overview/attention_entropy_min", min(entropies)
            logits = [head["max_logit"] for heads in layers.values() for head in heads if "max_logit" in head]
            yield "overview/attention_max_logit", max(logits)


class AttentionHeatMaps:
    """Draws every statistic, layers down and heads across. Drawing takes the time of many records."""

    def __init__(self, probe: Attention) -> None:
        self.over_batches, self.over_shards = probe.over_batches, probe.over_shards
        self.combine_rows = probe.combine_rows

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
            yield f"{tag}/{name}", float(np.mean(values))
            if statistic == "entropy":
                yield f"attention_entropy_min/{name}", min(values)
            if statistic == "sink":
                yield f"attention_sink_heads/{name}", float(np.mean([value > SINK_THRESHOLD for value in values]))
    logits = [head["max_logit"] for head in heads if "max_logit" in head]
    if logits:
        yield f"attention_max_logit/{name}", max(logits)


def _matrices(layers: list[list[dict[str, float]]]) -> Iterator[tuple[str, NDArray[np.float64]]]:
    for statistic in (*_TAG_OF, "max_logit"):
        matrix = np.full((len(layers), max(map(len, layers))), np.nan)
        for i, heads in enumerate(layers):
            matrix[i, : len(heads)] = [head.get(statistic, np.nan) for head in heads]
        yield statistic, matrix


def _descriptions(how: str) -> dict[str, str]:
    bound = how if how == _EXACT else f"{how}: a lower bound"
    texts = {
        group: f"{text} ({bound if group == 'attention_max_logit' else how})." for group, text in _MEANINGS.items()
    }
    pooled = "Attention of the first sequence, pooled to at most 128 by 128 pixels, which the axes count"
    return {**texts, "attention_map": f"{pooled}; every row adds up to 1."}
