"""Which tokens go to which experts, and how hard they are.

A token *type* is an entry of the vocabulary. A type's routes are those of its occurrences as input; its loss is the
mean cross-entropy of predicting its occurrences. Memory is bounded by types x experts, whatever the text.

Letters in shapes: V vocabulary, E experts of a layer, T tokens, K expert slots per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hmoe.costs import ModelCosts
from hmoe.routers import activated_experts

from .observe import Observation
from .statistics import without_nan


MAX_TABLE_ENTRIES = 1 << 27  # of 8 bytes, over all layers
LOSS_BIN_WIDTH = 0.5
NUM_LOSS_BINS = 24
# Table 5 of MoDSE: thresholds in nats, where the baseline's mean is 1.05.
PAPER_THRESHOLDS = (1.05, 1.2, 1.4, 1.6, 1.8, 2.0)


class TokenLosses:
    """Cross-entropy by token type, in two halves of the text (even and odd rows).

    The halves let a choice made on one be measured on the other, free of regression to the mean.

    Attributes:
        total: [2, V], sums in nats.
        count: [2, V], predicted occurrences.
    """

    def __init__(self, vocab_size: int):
        self.total = torch.zeros(2, vocab_size, dtype=torch.float64)
        self.count = torch.zeros(2, vocab_size, dtype=torch.long)
        self._rows = 0

    def update(self, observation: Observation) -> None:
        loss, ids = observation.loss.cpu(), observation.input_ids.cpu()
        known = ~loss.isnan()
        half = ((self._rows + torch.arange(len(ids))) % 2)[:, None].expand_as(ids)
        entries = half[known], ids[known]
        self.total.index_put_(entries, loss[known].double(), accumulate=True)
        self.count.index_put_(entries, torch.tensor(1), accumulate=True)
        self._rows += len(ids)

    @property
    def mean(self) -> float:
        """Nats per token of the whole text."""
        return float(self.total.sum() / self.count.sum())

    def by_type(self, half: int | None = None) -> Tensor:
        """[V], mean loss of each type in one half, or in both; NaN for types that do not occur."""
        total, count = (self.total.sum(0), self.count.sum(0)) if half is None else (self.total[half], self.count[half])
        return total / count


class TokenRoutes:
    """Activations by token type and expert, and the sizes that tokens of each loss choose.

    Attributes:
        sizes: of all experts, per layer.
        layers, kept_sizes: the layers whose tables are kept, and their sizes: all, or as many, evenly spaced, as fit
            into `MAX_TABLE_ENTRIES`.
        occurrences: [V].
        activations, first: per kept layer [V, E], occurrences that activate an expert, and that choose it first.
        bins: [2, `NUM_LOSS_BINS`, 4], sums over tokens by loss: tokens, loss, relative size, activated share; first
            for the position that predicts the token, then for the position that reads it.
    """

    def __init__(self, costs: ModelCosts, vocab_size: int, max_entries: int = MAX_TABLE_ENTRIES):
        self.sizes = sizes = costs.sizes
        most = max(1, max_entries // (2 * vocab_size * max(map(len, sizes))))
        self.layers = np.linspace(0, len(sizes) - 1, min(most, len(sizes))).round().astype(int).tolist()
        self.kept_sizes = [sizes[layer] for layer in self.layers]
        self.occurrences = torch.zeros(vocab_size, dtype=torch.long)
        self.activations = [torch.zeros(vocab_size, len(row), dtype=torch.long) for row in self.kept_sizes]
        self.first = [torch.zeros_like(table) for table in self.activations]
        self.bins = torch.zeros(2, NUM_LOSS_BINS, 4, dtype=torch.float64)
        self._moments = torch.zeros(2, 4, 4, dtype=torch.float64)  # sums of products of these four

    def update(self, observation: Observation) -> None:
        real = observation.mask.reshape(-1).cpu()
        ids = observation.input_ids.reshape(-1).cpu()[real]
        self.occurrences += torch.bincount(ids, minlength=len(self.occurrences))
        index = [chosen.cpu() for chosen in observation.index]
        for activations, first, layer in zip(self.activations, self.first, self.layers):
            chosen = index[layer][real]  # [T, K]
            for table, slots in ((activations, chosen), (first, chosen[:, :1])):
                table.index_add_(0, ids, activated_experts(slots, table.shape[1]).long())
        self._add_losses(observation.loss.cpu(), *chosen_sizes(self.sizes, index))

    def _add_losses(self, loss: Tensor, relative: Tensor, share: Tensor) -> None:
        relative, share = relative.view_as(loss), share.view_as(loss)
        known = ~loss[:, 1:].isnan()
        values = loss[:, 1:][known].double()
        bins = (values / LOSS_BIN_WIDTH).long().clamp(max=NUM_LOSS_BINS - 1)
        predicting, reading = slice(None, -1), slice(1, None)
        for table, moments, positions in zip(self.bins, self._moments, (predicting, reading)):
            of_token = [torch.ones_like(values), values, relative[:, positions][known], share[:, positions][known]]
            columns = torch.stack(of_token, dim=1)  # [T, 4]
            table.index_add_(0, bins, columns)
            moments += columns.T @ columns

    def loss_and_size(self) -> dict[str, Any]:
        """Chosen sizes by loss, and their correlation (HMoE Fig. 10 as a measurement).

        `relative_size` is the mean width of a token's experts over the layer's mean width, mean over layers: 1 is
        average. `activated_share` is the part of the layer's neurons that the token uses.
        """
        result: dict[str, Any] = {}
        for name, bins, moments in zip(("predicting", "reading"), self.bins, self._moments):
            rows = [
                {
                    "loss_from": bin_idx * LOSS_BIN_WIDTH,
                    "loss_to": None if bin_idx == NUM_LOSS_BINS - 1 else (bin_idx + 1) * LOSS_BIN_WIDTH,
                    "tokens": int(tokens),
                    "mean_loss": loss / tokens,
                    "relative_size": size / tokens,
                    "activated_share": share / tokens,
                }
                for bin_idx, (tokens, loss, size, share) in enumerate(bins.tolist())
                if tokens
            ]
            result[name] = {"correlation": _correlation(moments), "bins": rows}
        return result


def chosen_sizes(sizes: Sequence[Sequence[int]], index: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean over layers, per token [T]: mean width of its experts over the layer's mean width; share of neurons used.

    Args:
        index: per layer [T, K], expert ids; the number of experts marks an unused slot.
    """
    relative, share = [], []
    for layer_sizes, layer_index in zip(sizes, index, strict=True):
        total = torch.tensor([*layer_sizes, 0], dtype=torch.float64)[layer_index].sum(1)
        chosen = (layer_index < len(layer_sizes)).sum(1)
        relative.append(total / chosen / (sum(layer_sizes) / len(layer_sizes)))
        share.append(total / sum(layer_sizes))
    return torch.stack(relative).mean(0), torch.stack(share).mean(0)


def _correlation(moments: Tensor) -> float | None:
    """Of the columns 1 and 2, from sums of products [4, 4] whose column 0 counts; None if one does not vary."""
    if not moments[0, 0]:
        return None
    moments = moments / moments[0, 0]
    covariance = (moments - moments[0].outer(moments[0]))[1:3, 1:3]
    variances = covariance.diagonal()
    # Equal sizes leave only rounding of a zero variance.
    return None if variances.min() <= 1e-12 else float(covariance[0, 1] / variances.prod().sqrt())


def top_tokens(routes: TokenRoutes, num_tokens: int, min_count: int) -> list[dict[str, Any]]:
    """For each expert size, the token types with the largest activation share (HMoE Table 3; the ratio of Fig. 10).

    The share of a type is how many of its activations, over all kept layers, go to experts of this size.

    Args:
        min_count: occurrences below which a type is left out.
    """
    table, sizes = pool_by_size(routes.activations, routes.kept_sizes)  # [V, sizes]
    share = table / table.sum(1, keepdim=True).clamp(min=1)
    share[routes.occurrences < min_count] = -1.0
    rows = []
    for column, size in enumerate(sizes):
        values, ids = share[:, column].topk(min(num_tokens, len(share)))
        kept = values > 0
        rows.append({"size": size, "ids": ids[kept].tolist(), "shares": values[kept].tolist()})
    return rows


def example_tokens(routes: TokenRoutes, min_count: int, num_each: int = 8) -> dict[str, Any]:
    """The types whose experts are smallest and widest on average, smallest first, and the shares of their activations
    by expert size (HMoE Fig. 10)."""
    table, sizes = pool_by_size(routes.activations, routes.kept_sizes)  # [V, sizes]
    frequent = (routes.occurrences >= min_count).nonzero().squeeze(1)
    mean = (table[frequent] @ table.new_tensor(sizes)) / table[frequent].sum(1)
    order = frequent[mean.argsort()].tolist()
    ids = list(dict.fromkeys([*order[:num_each], *order[-num_each:]]))
    return {
        "sizes": sizes,
        "ids": ids,
        "occurrences": routes.occurrences[ids].tolist(),
        "shares": (table[ids] / table[ids].sum(1, keepdim=True).clamp(min=1)).tolist(),
    }


def pool_by_size(tables: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
    """[V, number of sizes] and the sizes, smallest first, from tables [V, E] of layers whose experts may differ."""
    every = sorted({size for row in sizes for size in row})
    pooled = torch.zeros(tables[0].shape[0], len(every), dtype=torch.float64)
    for table, row in zip(tables, sizes, strict=True):
        columns = torch.tensor([every.index(size) for size in row])
        pooled.index_add_(1, columns, table.double())
    return pooled, every


def similarity(routes: TokenRoutes, embedding: Tensor | None) -> dict[str, Any]:
    """Distances and divergences of the experts of each kept layer, and their means over layers if sizes are alike."""
    kinds = {
        "wasserstein": [wasserstein(table, embedding) for table in routes.activations],
        "kl": [kl_divergence(table) for table in routes.activations],
    }
    layers = [
        {"layer": layer, "sizes": sizes, **{kind: without_nan(values[i]) for kind, values in kinds.items()}}
        for i, (layer, sizes) in enumerate(zip(routes.layers, routes.kept_sizes))
    ]
    mean = None
    if all(sizes == routes.kept_sizes[0] for sizes in routes.kept_sizes):
        means = {kind: without_nan(torch.stack(values).nanmean(0)) for kind, values in kinds.items()}
        mean = {"sizes": routes.kept_sizes[0], **means}
    return {"layers": layers, "mean": mean}


def wasserstein(table: Tensor, embedding: Tensor | None = None, num_projections: int = 64) -> Tensor:
    """Wasserstein-1 distances [E, E] between the experts' distributions over token types (HMoE Fig. 9a).

    The distribution of an expert is the frequency of types among the tokens routed to it. The paper does not say how
    far two types are apart. Here, without `embedding`, any two types are at distance 1: the result is then the share
    of one expert's tokens that has to change to get the other's (total variation, 0 to 1). With `embedding` [V, D]
    types are points, scaled to a mean distance from their centre of 1, and the distance is sliced: the mean, over
    random directions, of the exact distance along each, times sqrt(D).

    Args:
        table: [V, E], counts. A column without counts gives NaN.
    """
    seen = table.sum(1) > 0
    distribution = table[seen].double() / table.sum(0, dtype=torch.float64)  # [V', E]
    if embedding is None:
        return torch.stack([(distribution - column[:, None]).abs().sum(0) / 2 for column in distribution.T])
    points = embedding[seen].double()
    points = points - points.mean(0)
    points = points / points.norm(dim=1).mean()
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(points.shape[1], num_projections, generator=generator, dtype=torch.float64)
    places = points @ (directions / directions.norm(dim=0))  # [V', projections]
    result = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64)
    for column in places.T:
        sorted_places, order = column.sort()
        cumulative = distribution[order].cumsum(0)[:-1]  # [V' - 1, E]
        gaps = sorted_places.diff()[:, None]
        result += torch.stack([((cumulative - other[:, None]).abs() * gaps).sum(0) for other in cumulative.T])
    return result / num_projections * points.shape[1] ** 0.5


def kl_divergence(table: Tensor, smoothing: float = 0.01) -> Tensor:
    """Divergences [E, E] in nats of expert x's (row) distribution over token types from expert y's (column), HMoE
    Fig. 9b ("synergy").

    A type that x sees and y does not would make it infinite, which the paper does not treat; so every distribution is
    mixed with `smoothing` parts of the distribution of all tokens. Low values: the experts share their tokens.

    Args:
        table: [V, E], counts. A column without counts gives NaN.
    """
    counts = table[table.sum(1) > 0].double()
    everything = counts.sum(1, keepdim=True) / counts.sum()
    distribution = (1 - smoothing) * counts / counts.sum(0) + smoothing * everything  # [V', E]
    logs = distribution.log()
    negative_entropy = (distribution * logs).sum(0)
    return (negative_entropy[:, None] - distribution.T @ logs).clamp(min=0)
