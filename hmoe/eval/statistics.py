"""What routers do with a text, as sums that do not grow with it: load, balance, confidence, co-activation.

Letters in shapes: T tokens, E experts, K expert slots per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hmoe.costs import ModelCosts
from hmoe.routers import activated_experts, balance, max_over_min, tokens_per_expert

from .observe import Observation


class LayerStatistics:
    """Sums over the tokens of one layer, padding excluded.

    Attributes:
        tokens: how many.
        choices: [K, E], how often an expert was the first, second, ... choice.
        num_chosen: [K + 1], tokens by their number of experts.
        probability: [E], sums of the router's softmax over all experts.
        entropy, confidence: sums of the softmax's entropy in nats and of its largest value.
        pairs: [E, E], tokens that activate both experts; the diagonal holds the load.
    """

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        self.tokens = 0
        self.choices = torch.zeros(0, num_experts, dtype=torch.long)
        self.num_chosen = torch.zeros(0, dtype=torch.long)
        self.probability = torch.zeros(num_experts, dtype=torch.float64)
        self.entropy = 0.0
        self.confidence = 0.0
        self.pairs = torch.zeros(num_experts, num_experts, dtype=torch.long)

    def update(self, logits: Tensor, index: Tensor) -> None:
        """Adds tokens: their router logits [T, E] and expert ids [T, K]."""
        probability = F.softmax(logits.float(), dim=-1)
        chosen = activated_experts(index, self.num_experts)  # [T, E]
        num_tokens, num_slots = index.shape
        self.tokens += num_tokens
        if not len(self.choices):
            self.choices = torch.zeros(num_slots, self.num_experts, dtype=torch.long)
            self.num_chosen = torch.zeros(num_slots + 1, dtype=torch.long)
        by_slot = [tokens_per_expert(slot, self.num_experts) for slot in index.split(1, dim=1)]
        self.choices += torch.stack(by_slot).cpu()
        self.num_chosen += torch.bincount(chosen.sum(1), minlength=num_slots + 1).cpu()
        self.probability += probability.double().sum(0).cpu()
        self.entropy += float(torch.special.entr(probability).sum(dtype=torch.float64))
        self.confidence += float(probability.amax(1).sum(dtype=torch.float64))
        # Counts of one batch are far below 2 ** 24, where float32 stops being exact.
        self.pairs += (chosen.float().T @ chosen.float()).long().cpu()

    @property
    def counts(self) -> Tensor:
        """[E], tokens that activate each expert."""
        return self.choices.sum(0)

    @property
    def load(self) -> list[float]:
        """Share of tokens that activate each expert; sums to the experts per token (T_i of HMoE Eq. 3)."""
        return [count / self.tokens for count in self.counts.tolist()]


class RoutingStatistics:
    """[`LayerStatistics`] of every layer of one model."""

    def __init__(self, architecture: ModelCosts):
        self.architecture = architecture
        self.layers = [LayerStatistics(len(sizes)) for sizes in architecture.sizes]

    def update(self, observation: Observation) -> None:
        real = observation.mask.reshape(-1)
        for layer, logits, index in zip(self.layers, observation.logits, observation.index, strict=True):
            layer.update(logits[real.to(logits.device)], index[real.to(index.device)])

    def load(self) -> list[list[float]]:
        return [layer.load for layer in self.layers]

    def summary(self) -> dict[str, Any]:
        """All numbers of the routing, whole model first."""
        load = self.load()
        model = self.architecture
        return {
            "tokens": self.layers[0].tokens,
            "parameters": model.parameters,
            "activated_parameters": model.activated_parameters(load),
            "activated_ratio": model.activated_ratio(load),
            "experts_per_token": sum(map(sum, load)) / len(load),
            "by_size": load_by_size(model.sizes, [layer.counts.tolist() for layer in self.layers]),
            "layers": [self._layer_summary(layer_idx) for layer_idx in range(len(self.layers))],
        }

    def _layer_summary(self, layer_idx: int) -> dict[str, Any]:
        layer, sizes = self.layers[layer_idx], self.architecture.sizes[layer_idx]
        load, counts = layer.load, layer.counts.tolist()
        parameters = self.architecture.expert_parameters[layer_idx]
        used = sum(x * n for x, n in zip(load, parameters))
        return {
            "sizes": sizes,
            "load": load,
            "activation_share": [count / max(sum(counts), 1) for count in counts],
            "experts_per_token": sum(load),
            "num_experts_histogram": [count / layer.tokens for count in layer.num_chosen.tolist()],
            "activated_parameters": used,
            "activated_ratio": used / sum(parameters),
            "mean_activated_size": sum(c * s for c, s in zip(counts, sizes)) / max(sum(counts), 1),
            "mean_probability": (layer.probability / layer.tokens).tolist(),
            "router_entropy": layer.entropy / layer.tokens,
            "router_entropy_ratio": layer.entropy / layer.tokens / math.log(len(sizes)) if len(sizes) > 1 else 0.0,
            "router_confidence": layer.confidence / layer.tokens,
            "choices": layer.choices.tolist(),
            **balance(counts),
            "max_over_min_by_choice": [max_over_min(choice) for choice in layer.choices.tolist()],
            "coactivation": coactivation(layer.pairs),
            "coactivation_lift": coactivation_lift(layer.pairs, layer.tokens),
        }


def load_by_size(sizes: Sequence[Sequence[int]], counts: Sequence[Sequence[int]]) -> list[dict[str, float]]:
    """Activations by expert size, over all layers, smallest size first (HMoE Fig. 3 right, 6 and 7).

    `share` is the size's share of all activations, `share_if_even` that of its experts by number, `neuron_share` that
    of its experts by width.
    """
    total = sum(map(sum, counts))
    num_experts = sum(map(len, sizes))
    width = sum(map(sum, sizes))
    rows = []
    for size in sorted({size for row in sizes for size in row}):
        count = sum(c for row, row_counts in zip(sizes, counts) for s, c in zip(row, row_counts) if s == size)
        experts = sum(row.count(size) for row in map(list, sizes))
        rows.append(
            {
                "size": size,
                "experts": experts,
                "activations": count,
                "share": count / total,
                "share_if_even": experts / num_experts,
                "neuron_share": experts * size / width,
            }
        )
    return rows


def coactivation(pairs: Tensor) -> list[list[float | None]]:
    """[E, E]: of the tokens that activate expert i, the share that activates j too; None for a dead expert i."""
    return [[None if not row[i] else value / row[i] for value in row] for i, row in enumerate(pairs.tolist())]


def coactivation_lift(pairs: Tensor, tokens: int) -> list[list[float | None]]:
    """[E, E]: how often i and j are activated together, over what independent choices with their loads would give.

    Above 1 they attract, below they avoid each other; a Top-K router's limit of K makes the mean fall below 1.
    """
    counts = pairs.diagonal().tolist()
    return [
        [
            None if not counts[i] * counts[j] else value * tokens / (counts[i] * counts[j])
            for j, value in enumerate(row)
        ]
        for i, row in enumerate(pairs.tolist())
    ]
