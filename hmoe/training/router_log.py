"""What the router does, summed over a logging window on the device and read back once per log.

Averages are ratios of sums: over tokens, all accumulation steps and all ranks, so batches of different length and
ranks with different padding count by what they hold.

Letters in shapes: B batch, S sequence, T = B * S tokens, E experts (E_max the most of any layer), K expert slots per
token, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hmoe.configuration_hmoe import count_parameters, is_hmoe
from hmoe.costs import TRAIN_FACTOR, ForwardFlops
from hmoe.routing_hmoe import ROUTER_LOSSES


DETAILS = ("off", "brief", "per_layer")


@dataclass
class RouterWindow:
    """Sums over all ranks, from one log to the next.

    Attributes:
        labels: predicted labels.
        losses: sums of the cross-entropy (`lm_loss`) over them and of the unscaled router terms, weighted by them.
        tokens: tokens that went through the model, padding excluded.
        flops: training FLOPs by activated experts, padding included ([`hmoe.costs`]).
        expert_tokens: per layer, per expert, the tokens that activated it; empty for a dense model.
    """

    labels: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    tokens: float = 0.0
    flops: float = 0.0
    expert_tokens: list[list[float]] = field(default_factory=list)

    def __add__(self, other: RouterWindow) -> RouterWindow:
        rows = self.expert_tokens or [[0.0] * len(row) for row in other.expert_tokens]
        more = other.expert_tokens or [[0.0] * len(row) for row in rows]
        names = {**self.losses, **other.losses}
        return RouterWindow(
            labels=self.labels + other.labels,
            losses={name: self.losses.get(name, 0.0) + other.losses.get(name, 0.0) for name in names},
            tokens=self.tokens + other.tokens,
            flops=self.flops + other.flops,
            expert_tokens=[[a + b for a, b in zip(row, row_more)] for row, row_more in zip(rows, more)],
        )

    def mean_losses(self) -> dict[str, float]:
        return {name: value / self.labels for name, value in self.losses.items()} if self.labels else {}

    def load(self) -> list[list[float]]:
        """Per layer, per expert, the share of tokens that activated it; a layer sums to its experts per token."""
        return [[count / max(self.tokens, 1.0) for count in row] for row in self.expert_tokens]


class RouterMetrics:
    """Accumulates forward passes. Nothing here waits for the device but [`RouterMetrics.collect`]."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._shared_flops = 0.0
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
        flops: ForwardFlops | None = None,
    ) -> None:
        """Adds one forward pass.

        Args:
            outputs: a causal LM's outputs in dict form. Of HMoE all of it is used; of others the loss and, where the
                model was told to return them, `aux_loss` and `router_logits`.
            inputs: what the model was called with; a batch without labels is left out.
            num_items_in_batch: what the summed cross-entropy was divided by; None if by the labels at hand.
            loss_scale: what `outputs.loss`, and nothing else, was multiplied with since.
            flops: of the model, to count training FLOPs.
        """
        num_labels = count_labels(inputs)
        if num_labels is None:
            return
        wide = torch.float32 if num_labels.device.type == "mps" else torch.float64
        lm_loss, terms = _loss_terms(outputs, config, loss_scale)
        if lm_loss is not None:
            divisor = num_labels if num_items_in_batch is None else num_items_in_batch
            # The mean over no labels is NaN, and no labels count nothing.
            self._add("lm_loss", torch.where(num_labels > 0, lm_loss.to(wide) * divisor, 0))
        if terms:
            values = torch.stack([value.to(num_labels.device) for value in terms.values()])
            self._add(" ".join(terms), values.to(wide) * num_labels)
        batch, length = _first_input(inputs).shape[:2]
        mask = _token_mask(inputs)
        num_tokens = num_labels.new_full((), batch * length) if mask is None else mask.sum()
        self._add("counts", torch.stack([num_labels, num_tokens]))
        index, self._num_experts = _router_index(outputs, config)
        if index:
            self._add("experts", _expert_counts(index, self._num_experts, mask))
        if flops is not None:
            count = flops.shared if index else flops.count
            self._shared_flops += count(batch * length, length)

    def _add(self, name: str, values: Tensor) -> None:
        self._sums[name] = self._sums[name] + values if name in self._sums else values

    def collect(
        self, reduce: Callable[[Tensor], Tensor], *, flops: ForwardFlops | None = None, replicas: int = 1
    ) -> RouterWindow:
        """Everything since the last call, summed over ranks.

        Args:
            reduce: sums a tensor over all ranks; every rank calls this together.
            flops: as given to [`RouterMetrics.update`].
            replicas: ranks that see the same batch (tensor parallelism).
        """
        if not self._sums:
            return RouterWindow()
        device = self._sums["counts"].device
        wide = torch.float32 if device.type == "mps" else torch.float64
        shared = torch.tensor(self._shared_flops, dtype=wide, device=device)
        parts = {name: values.reshape(-1).to(device, wide) for name, values in self._sums.items()}
        parts["flops"] = shared.reshape(1)
        values = (reduce(torch.cat(list(parts.values()))) / replicas).split([len(part) for part in parts.values()])
        sums = {name: value.tolist() for name, value in zip(parts, values)}
        num_experts = self._num_experts
        self._sums, self._shared_flops = {}, 0.0
        return _make_window(sums, num_experts, flops)


def _make_window(sums: dict[str, list[float]], num_experts: list[int], flops: ForwardFlops | None) -> RouterWindow:
    labels, tokens = sums.pop("counts")
    (forward,) = sums.pop("flops")
    rows = sums.pop("experts", [])
    used = _split_rows(rows[: len(rows) // 2], num_experts)
    padding = _split_rows(rows[len(rows) // 2 :], num_experts)
    if flops is not None and used:
        for row, row_padding, row_flops in zip(used, padding, flops.per_expert):
            forward += sum((a + b) * c for a, b, c in zip(row, row_padding, row_flops))
    losses = {name: value for names, values in sums.items() for name, value in zip(names.split(), values)}
    return RouterWindow(labels, losses, tokens, TRAIN_FACTOR * forward, used)


def _split_rows(values: list[float], num_experts: list[int]) -> list[list[float]]:
    stride = len(values) // max(len(num_experts), 1)
    return [values[layer * stride : layer * stride + count] for layer, count in enumerate(num_experts) if values]


def _expert_counts(index: Sequence[Tensor], num_experts: list[int], mask: Tensor | None) -> Tensor:
    """[2, L, E_max + 1]: tokens per expert, then the same of padding; unused Top-P slots land behind the experts."""
    device, stride = index[-1].device, max(num_experts) + 1
    block = len(index) * stride
    ids = [layer * stride + layer_index.to(device) for layer, layer_index in enumerate(index)]  # [T, K] each
    if mask is not None:
        behind = torch.where(mask.reshape(-1, 1).to(device), 0, block)  # [T, 1]
        ids = [layer_ids + behind for layer_ids in ids]
    flat = torch.cat([layer_ids.reshape(-1) for layer_ids in ids])
    counts = torch.zeros(2 * block, dtype=torch.int64, device=device)
    # Unlike bincount, this does not wait for the device.
    return counts.scatter_add_(0, flat, torch.ones_like(flat)).view(2, len(index), stride)


def count_labels(inputs: dict[str, Any]) -> Tensor | None:
    """How many labels a causal LM predicts in this batch; None without labels."""
    labels = inputs.get("shift_labels")
    if labels is None:
        if inputs.get("labels") is None:
            return None
        labels = inputs["labels"][..., 1:]
    return (labels != -100).sum()


def _first_input(inputs: dict[str, Any]) -> Tensor:
    return inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]


def _token_mask(inputs: dict[str, Any]) -> Tensor | None:
    """[B, S], or None where every token counts (masks of other ranks describe pairs of tokens)."""
    mask = inputs.get("attention_mask")
    return mask.bool() if torch.is_tensor(mask) and mask.dim() == 2 else None


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
    entries["experts_per_token"] = _mean([layer["experts_per_token"] for layer in layers])
    entries["load_imbalance"] = _mean([layer["load_imbalance"] for layer in layers])
    entries["dead_experts"] = sum(layer["dead_experts"] for layer in layers)
    if is_hmoe(config):
        parameters = count_parameters(config, load=load)
        entries["activated_parameters"] = parameters.activated
        entries["activated_ratio"] = parameters.activated_ratio
    for number, layer in enumerate(layers if detail == "per_layer" else []):
        if is_hmoe(config):
            sizes = config.layer_expert_sizes[number]
            layer["activated_ratio"] = sum(x * size for x, size in zip(load[number], sizes)) / sum(sizes)
        layer |= {f"load/expert_{expert:02d}": share for expert, share in enumerate(load[number])}
        entries |= {f"layer_{number:02d}/{name}": value for name, value in layer.items()}
    return entries


def _layer_entries(load: list[float]) -> dict[str, float]:
    experts_per_token = sum(load)
    entries = {
        "experts_per_token": experts_per_token,
        "load_imbalance": max(load) * len(load) / experts_per_token if experts_per_token else 0.0,
        "dead_experts": sum(share == 0 for share in load),
    }
    if min(load) > 0:
        entries["load_max_over_min"] = max(load) / min(load)
    return entries


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
