"""What routers do with a text, as sums that do not grow with it: load, balance, confidence, co-activation.

Letters in shapes: T tokens, E experts, K expert slots per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from hmoe.costs import ModelCosts
from hmoe.routers import activated_experts, balance, max_over_min, tokens_per_expert

from .observe import Observation


class LayerStatistics:
    """Sums over the tokens of one layer, padding excluded.

    Attributes:
        sizes, parameters: neurons and parameters of each expert.
        tokens: how many.
        choices: [K, E], how often an expert was the first, second, ... choice.
        num_chosen: [K + 1], tokens by their number of experts.
        probability: [E], sums of the router's softmax over all experts.
        entropy, confidence: sums of the softmax's entropy in nats and of its largest value.
        pairs: [E, E], tokens that activate both experts; the diagonal holds the load.
    """

    def __init__(self, sizes: Sequence[int], parameters: Sequence[int]):
        self.sizes, self.parameters = sizes, parameters
        self.num_experts = num_experts = len(sizes)
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

    def summary(self) -> dict[str, Any]:
        """All numbers of the layer."""
        load, counts, choices = self.load, self.counts.tolist(), self.choices.tolist()
        activations = max(sum(counts), 1)
        used = sum(x * n for x, n in zip(load, self.parameters))
        entropy = self.entropy / self.tokens
        pairs = self.pairs.double()
        activating = pairs.diagonal()  # [E]
        return {
            "sizes": self.sizes,
            "load": load,
            "activation_share": [count / activations for count in counts],
            "experts_per_token": sum(load),
            "num_experts_histogram": [count / self.tokens for count in self.num_chosen.tolist()],
            "activated_parameters": used,
            "activated_ratio": used / sum(self.parameters),
            "mean_activated_size": sum(c * s for c, s in zip(counts, self.sizes)) / activations,
            "mean_probability": (self.probability / self.tokens).tolist(),
            "router_entropy": entropy,
            "router_entropy_ratio": entropy / math.log(self.num_experts) if self.num_experts > 1 else 0.0,
            "router_confidence": self.confidence / self.tokens,
            "choices": choices,
            **balance(counts),
            "max_over_min_by_choice": [max_over_min(choice) for choice in choices],
            # Of the tokens that activate expert i (row), the share that activates j too.
            "coactivation": without_nan(pairs / activating[:, None]),
            # Over what independent choices with their loads would give: above 1 they attract, below they avoid each
            # other; a Top-K router's limit of K makes the mean fall below 1.
            "coactivation_lift": without_nan(pairs * self.tokens / activating.outer(activating)),
        }


class RoutingStatistics:
    """[`LayerStatistics`] of every layer of one model."""

    def __init__(self, costs: ModelCosts):
        self.costs = costs
        self.layers = [LayerStatistics(*experts) for experts in zip(costs.sizes, costs.expert_parameters)]

    def update(self, observation: Observation) -> None:
        real = observation.mask.reshape(-1)
        for layer, logits, index in zip(self.layers, observation.logits, observation.index, strict=True):
            layer.update(logits[real.to(logits.device)], index[real.to(index.device)])

    def summary(self) -> dict[str, Any]:
        """All numbers of the routing, whole model first."""
        return {
            "tokens": self.layers[0].tokens,
            "parameters": self.costs.parameters,
            **activated(self.costs, [layer.load for layer in self.layers]),
            "by_size": load_by_size(self.costs.sizes, [layer.counts.tolist() for layer in self.layers]),
            "layers": [layer.summary() for layer in self.layers],
        }


def activated(costs: ModelCosts, load: Sequence[Sequence[float]]) -> dict[str, float]:
    """What a token activates of a model on average, by load (HMoE Tables 1 and 2)."""
    return {
        "activated_parameters": costs.activated_parameters(load),
        "activated_ratio": costs.activated_ratio(load),
        "experts_per_token": sum(map(sum, load)) / len(load),
    }


def load_by_size(sizes: Sequence[Sequence[int]], counts: Sequence[Sequence[int]]) -> list[dict[str, float]]:
    """Activations by expert size, over all layers, smallest size first (HMoE Fig. 3 right, 6 and 7).

    `share` is the size's share of all activations, `share_if_even` that of its experts by number, `neuron_share` that
    of its experts by width.
    """
    experts = pd.DataFrame({"size": list(chain(*sizes)), "activations": list(chain(*counts))})
    rows = experts.groupby("size")["activations"].agg(experts="size", activations="sum").reset_index()
    neurons = rows["experts"] * rows["size"]
    rows["share"] = rows["activations"] / rows["activations"].sum()
    rows["share_if_even"] = rows["experts"] / rows["experts"].sum()
    rows["neuron_share"] = neurons / neurons.sum()
    return rows.to_dict("records")


def without_nan(values: Tensor) -> list:
    """Nested lists, with None for NaN, which JSON lacks."""
    entries = values.numpy().astype(object)
    entries[values.isnan().numpy()] = None
    return entries.tolist()
