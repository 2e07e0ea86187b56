"""Losses, expert load, tokens and FLOPs of training, summed on the device and read back once per log.

Averages are ratios of sums: over tokens, all accumulation steps and all ranks, so batches of different length and
ranks with different padding count by what they hold.

Letters in shapes: B batch, S sequence, T = B * S tokens, E experts, K expert slots per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice, repeat
from typing import Any

import torch
from torch import Tensor

from hmoe.configuration_hmoe import is_hmoe
from hmoe.costs import TRAIN_FACTOR, ForwardFlops, model_costs
from hmoe.routers import balance, tokens_per_expert
from hmoe.routing_hmoe import ROUTER_LOSSES


@dataclass
class RouterWindow:
    """Sums over all ranks, from one log to the next.

    Attributes:
        labels: predicted labels.
        losses: sums of the cross-entropy (`lm_loss`) over them and of the unscaled router terms, weighted by them.
        tokens: tokens that went through the model, padding excluded.
        padded_tokens: the same, padding included.
        flops: training FLOPs by activated experts, padding included ([`hmoe.costs`]).
        expert_tokens: per layer, per expert, the tokens that activated it; empty for a dense model.
    """

    labels: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    tokens: float = 0.0
    padded_tokens: float = 0.0
    flops: float = 0.0
    expert_tokens: list[list[float]] = field(default_factory=list)

    def __add__(self, other: RouterWindow) -> RouterWindow:
        names = {**self.losses, **other.losses}
        layers = zip(self.expert_tokens, other.expert_tokens)
        return RouterWindow(
            labels=self.labels + other.labels,
            losses={name: self.losses.get(name, 0.0) + other.losses.get(name, 0.0) for name in names},
            tokens=self.tokens + other.tokens,
            padded_tokens=self.padded_tokens + other.padded_tokens,
            flops=self.flops + other.flops,
            expert_tokens=[[a + b for a, b in zip(*rows)] for rows in layers]
            or self.expert_tokens
            or other.expert_tokens,
        )

    def mean_losses(self) -> dict[str, float]:
        return {name: value / self.labels for name, value in self.losses.items()} if self.labels else {}

    def load(self) -> list[list[float]]:
        """Per layer, per expert, the share of tokens that activated it; a layer sums to its experts per token."""
        return [[count / max(self.tokens, 1.0) for count in row] for row in self.expert_tokens]


class RouterMetrics:
    """Adds up forward passes. Nothing here waits for the device but [`RouterMetrics.collect`].

    Args:
        flops: of the model, to count training FLOPs.
    """

    def __init__(self, flops: ForwardFlops | None = None) -> None:
        self._flops = flops
        self._sums: dict[str, Tensor] = {}
        self._padded_tokens = 0
        self._forward_flops = 0.0  # without experts whose tokens are counted
        self._num_experts: list[int] = []

    @torch.no_grad()
    def update(
        self,
        outputs: Any,
        inputs: dict[str, Any],
        config: Any,
        *,
        num_items_in_batch: Tensor | int | None = None,
        loss_scale: int = 1,
    ) -> None:
        """Adds one forward pass.

        Args:
            outputs: a causal LM's outputs in dict form. Of HMoE all of it is used; of others the loss and, where the
                model was told to return them, `aux_loss` and `router_logits`.
            inputs: what the model was called with; without labels there are no losses to add.
            num_items_in_batch: what the summed cross-entropy was divided by; None if by the labels at hand.
            loss_scale: what `outputs.loss`, and nothing else, was multiplied with since.
        """
        num_labels = count_labels(inputs)
        if num_labels is not None:
            divisor = num_labels if num_items_in_batch is None else num_items_in_batch
            self._add_losses(*_loss_terms(outputs, config, loss_scale), num_labels, divisor)
        self._add_tokens(inputs, *_router_index(outputs, config))

    def _add_losses(
        self, lm_loss: Tensor | None, terms: dict[str, Tensor], num_labels: Tensor, divisor: Tensor | int
    ) -> None:
        self._add("labels", num_labels)
        if lm_loss is not None:
            # The mean over no labels is NaN, and no labels count nothing.
            self._add("lm_loss", torch.where(num_labels > 0, lm_loss.to(_wide(lm_loss.device)) * divisor, 0))
        if terms:
            values = torch.stack([value.to(num_labels.device) for value in terms.values()])
            self._add(" ".join(terms), values.to(_wide(values.device)) * num_labels)

    def _add_tokens(self, inputs: dict[str, Any], index: Sequence[Tensor], num_experts: list[int]) -> None:
        first = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        batch, length = first.shape[:2]
        mask = inputs.get("attention_mask")
        # Masks of more dimensions describe pairs of tokens.
        mask = mask.bool() if torch.is_tensor(mask) and mask.dim() == 2 else None  # [B, S]
        self._add("tokens", first.new_full((), batch * length, dtype=torch.int64) if mask is None else mask.sum())
        self._padded_tokens += batch * length
        self._num_experts = num_experts
        if index:
            used = _expert_counts(index, num_experts, mask)
            padded = used if mask is None else _expert_counts(index, num_experts, None)
            self._add("experts", torch.stack([used, padded]))
        if self._flops is not None:
            # The experts of a model without logits in its outputs are of one size: any routing costs the same.
            self._forward_flops += (self._flops.shared if index else self._flops.count)(batch * length, length)

    def _add(self, name: str, values: Tensor) -> None:
        self._sums[name] = self._sums[name] + values if name in self._sums else values

    def collect(self, reduce: Callable[[Tensor], Tensor], *, replicas: int = 1) -> RouterWindow:
        """Everything since the last call, summed over ranks.

        Args:
            reduce: sums a tensor over all ranks; every rank calls this together.
            replicas: ranks that see the same batch (tensor parallelism).
        """
        if not self._sums:
            return RouterWindow()
        device = self._sums["tokens"].device
        host = torch.tensor([self._padded_tokens, self._forward_flops], dtype=_wide(device))
        parts = {
            name: values.reshape(-1).to(device, host.dtype) for name, values in (self._sums | {"host": host}).items()
        }
        values = (reduce(torch.cat(list(parts.values()))) / replicas).split([len(part) for part in parts.values()])
        sums = {name: value.tolist() for name, value in zip(parts, values)}
        self._sums, self._padded_tokens, self._forward_flops = {}, 0, 0.0
        return self._make_window(sums)

    def _make_window(self, sums: dict[str, list[float]]) -> RouterWindow:
        (labels,), (tokens,) = sums.pop("labels", [0.0]), sums.pop("tokens")
        padded_tokens, flops = sums.pop("host")
        counts = iter(sums.pop("experts", []))
        used, padded = ([list(islice(counts, length)) for length in self._num_experts] for _ in range(2))
        if self._flops is not None:
            flops += sum(n * cost for row, costs in zip(padded, self._flops.per_expert) for n, cost in zip(row, costs))
        losses = {name: value for names, values in sums.items() for name, value in zip(names.split(), values)}
        return RouterWindow(labels, losses, tokens, padded_tokens, TRAIN_FACTOR * flops, used)


def _expert_counts(index: Sequence[Tensor], num_experts: list[int], mask: Tensor | None) -> Tensor:
    """Tokens per expert of one layer after the other, on the device of the last."""
    rows = map(tokens_per_expert, index, num_experts, repeat(mask))
    return torch.cat([row.to(index[-1].device) for row in rows])


def count_labels(inputs: dict[str, Any]) -> Tensor | None:
    """How many labels a causal LM predicts in this batch; None without labels."""
    labels = inputs.get("shift_labels")
    if labels is None:
        if inputs.get("labels") is None:
            return None
        labels = inputs["labels"][..., 1:]
    return (labels != -100).sum()


def _wide(device: torch.device) -> torch.dtype:
    """The type that sums are kept in: the widest that the device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def _loss_terms(outputs: Any, config: Any, loss_scale: int) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The cross-entropy and the router terms."""
    terms = {name: outputs[name].mean() for name in ("aux_loss", *ROUTER_LOSSES) if outputs.get(name) is not None}
    loss, lm_loss = outputs.get("loss"), outputs.get("lm_loss")
    if lm_loss is not None and lm_loss is not loss:
        return lm_loss.mean(), terms
    if loss is None:
        return None, terms
    lm_loss = loss.mean() / loss_scale
    # Stock MoE models of Transformers return only the sum.
    if "aux_loss" in terms and outputs.get("lm_loss") is None:
        lm_loss = lm_loss - config.router_aux_loss_coef * terms["aux_loss"].to(lm_loss.device)
    return lm_loss, terms


def _router_index(outputs: Any, config: Any) -> tuple[Sequence[Tensor], list[int]]:
    """Per layer the activated experts [T, K], and the number of experts."""
    logits = outputs.get("router_logits") or ()
    index = outputs.get("router_index")
    if index is None:
        index = [scores.topk(config.num_experts_per_tok, dim=-1).indices for scores in logits]
    return index, [scores.shape[-1] for scores in logits]


def summarise(window: RouterWindow, config: Any, detail: str = "brief") -> dict[str, float]:
    """The window as flat log entries.

    | entry | meaning |
    |---|---|
    | `lm_loss`, `aux_loss`, `..._loss` | cross-entropy; weighted sum of the router terms; each raw term |
    | `experts_per_token` | activated experts of a token, mean over layers |
    | `load_imbalance` | load of the busiest expert over the mean, mean over layers; 1 is even |
    | `dead_experts` | experts, over all layers, that no token activated |
    | `activated_parameters`, `activated_ratio` | per token, from the measured load; share of the expert parameters |

    `"per_layer"` adds `layer_03/...`: the same by layer, `load_max_over_min` (MoDSE's statistic, left out where an
    expert is dead) and `load/expert_05`, the share of tokens that activated the expert.
    """
    entries = window.mean_losses()
    load = window.load()
    if not load:
        return entries
    layers = [_layer_entries(row) for row in load]
    for name in ("experts_per_token", "load_imbalance"):
        entries[name] = sum(layer[name] for layer in layers) / len(layers)
    entries["dead_experts"] = sum(layer["dead_experts"] for layer in layers)
    if is_hmoe(config):
        costs = model_costs(config)
        entries["activated_parameters"] = costs.activated_parameters(load)
        entries["activated_ratio"] = costs.activated_ratio(load)
    for layer_idx, layer in enumerate(layers if detail == "per_layer" else []):
        if is_hmoe(config):
            sizes = config.layer_expert_sizes[layer_idx]
            layer["activated_ratio"] = sum(x * size for x, size in zip(load[layer_idx], sizes)) / sum(sizes)
        layer |= {f"load/expert_{expert:02d}": share for expert, share in enumerate(load[layer_idx])}
        entries |= {f"layer_{layer_idx:02d}/{name}": value for name, value in layer.items()}
    return entries


def _layer_entries(load: list[float]) -> dict[str, float]:
    even = balance(load)
    entries = {"experts_per_token": sum(load)} | {name: even[name] for name in ("load_imbalance", "dead_experts")}
    if even["max_over_min"] is not None:
        entries["load_max_over_min"] = even["max_over_min"]
    return entries
