"""Routing: the routers, Top-K and Top-P, the router losses with their weighted sum, and the share that scales them.

To add a router: a subclass of [`HMoERouter`] in `ROUTERS`, its name among those of the config field `router_type`. To
add a routing: a function in `ROUTINGS`, its name among those of `routing`. To add a router loss: a function in
`ROUTER_LOSSES` and the config field of its coefficient, `<name>_coef`. tests/test_extending.py does all three.

Papers: HMoE (arXiv 2408.10681), MoDSE (arXiv 2409.12210), ST-MoE (arXiv 2202.08906). This file travels with every
saved checkpoint.

Letters in shapes: T tokens, E experts, K expert slots per token (an unused slot holds the id E), H hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.mixtral import modeling_mixtral
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm


if TYPE_CHECKING:
    from .configuration_hmoe import HMoEConfig


def route_top_k(probability: Tensor, num_experts_per_tok: int, *, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """Top-K routing (HMoE Eq. 8; MoDSE Eq. 1-2): weights and ids [T, K] of the K largest of `probability` [T, E]."""
    weights, index = torch.topk(probability, num_experts_per_tok, dim=-1)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, index


def route_top_p(probability: Tensor, top_p: float, max_experts_per_tok: int | None = None) -> tuple[Tensor, Tensor]:
    """Top-P routing (HMoE Eq. 9-11): the fewest experts whose probabilities sum to at least `top_p`, renormalised.

    The expert that crosses `top_p` is included, so there is at least one; of equal probabilities the lower id comes
    first.

    Args:
        probability: [T, E].
        max_experts_per_tok: cap K on the experts of a token; default E.

    Returns:
        weights [T, K] and ids [T, K]; unused slots hold weight 0 and the id E. A NaN probability gives a NaN weight.
    """
    num_experts = probability.shape[-1]
    max_experts = min(max_experts_per_tok or num_experts, num_experts)
    sorted_probability, index = torch.sort(probability, dim=-1, descending=True, stable=True)
    sorted_probability, index = sorted_probability[:, :max_experts], index[:, :max_experts]  # [T, K]
    reached_before = F.pad(sorted_probability.cumsum(dim=-1)[:, :-1], (1, 0))  # mass of the experts that come first
    used = reached_before < top_p
    weights = torch.where(used, sorted_probability, 0)
    return weights / weights.sum(dim=-1, keepdim=True), torch.where(used, index, num_experts)


def _top_k(probability: Tensor, config: HMoEConfig) -> tuple[Tensor, Tensor]:
    return route_top_k(probability, config.num_experts_per_tok, normalize=config.norm_topk_prob)


def _top_p(probability: Tensor, config: HMoEConfig) -> tuple[Tensor, Tensor]:
    return route_top_p(probability, config.router_top_p, config.max_experts_per_tok)


# From router probabilities [T, E] and the config to weights and expert ids [T, K].
ROUTINGS: dict[str, Callable[[Tensor, HMoEConfig], tuple[Tensor, Tensor]]] = {"top_k": _top_k, "top_p": _top_p}


class HMoERouter(nn.Module):
    """Scores every expert for every token, here by one linear map, and activates some of them.

    Attributes:
        matrices: names of the [E, H] parameters, which are drawn like the model's linear layers and which LoRA can
            adapt. A router's other parameters have E rows too.
    """

    matrices: tuple[str, ...] = ("weight",)
    weight: Tensor

    def __init__(self, config: HMoEConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.num_experts = len(config.layer_expert_sizes[layer_idx])
        for name in self.matrices:
            self.register_parameter(name, nn.Parameter(torch.empty(self.num_experts, config.hidden_size)))

    def init_weights(self, std: float) -> None:
        """Draws the router's own parameters; those of its submodules are drawn by type, as in the whole model."""
        for name in self.matrices:
            init.normal_(getattr(self, name), mean=0.0, std=std)

    def scores(self, hidden_states: Tensor) -> Tensor:
        """Router logits [T, E] of `hidden_states` [T, H]: fp32 or wider, without autocast."""
        return F.linear(hidden_states, self.weight.to(hidden_states.dtype))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Router logits [T, E], weights [T, K] and expert ids [T, K] of `hidden_states` [T, H]."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            logits = self.scores(hidden_states.to(dtype))
            weights, index = ROUTINGS[self.config.routing](F.softmax(logits, dim=-1), self.config)
        return logits, weights, index


class ModseRouter(HMoERouter):
    """A linear map plus RMSNorm(softplus(linear)) (MoDSE Eq. 1-5).

    MoDSE calls the second term noise, yet it is learned and draws nothing at random.
    """

    matrices = ("weight", "noise_weight")
    noise_weight: Tensor

    def __init__(self, config: HMoEConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.noise_norm = MixtralRMSNorm(self.num_experts, eps=config.rms_norm_eps)

    def scores(self, hidden_states: Tensor) -> Tensor:
        noise = F.softplus(F.linear(hidden_states, self.noise_weight.to(hidden_states.dtype)))  # [T, E]
        return super().scores(hidden_states) + self.noise_norm(noise)


ROUTERS: dict[str, type[HMoERouter]] = {"linear": HMoERouter, "modse": ModseRouter}


def router_parameter_names(config: HMoEConfig) -> list[str]:
    """Names of the parameters of each router, relative to it."""
    with torch.device("meta"):
        return [name for name, _ in ROUTERS[config.router_type](config, 0).named_parameters()]


@dataclass
class LayerRouting:
    """How one layer routed a batch: what a router loss is computed from.

    Attributes:
        logits: [T, E], fp32.
        expert_sizes: of this layer.
        token_mask: [T], true where the token counts; None counts all.
        probability: [E], mean router probability of each expert; the gradient flows through it and the logits.
        frequency: [E], share of tokens that activate each expert; no gradient.
        count: the same share for other ids than the activated, [T, K] to [E].
    """

    config: HMoEConfig
    logits: Tensor
    expert_sizes: Sequence[int]
    token_mask: Tensor | None
    probability: Tensor
    frequency: Tensor
    count: Callable[[Tensor], Tensor]

    def mean_over_tokens(self, values: Tensor) -> Tensor:
        """Mean of `values` [T, ...] over the tokens that count, [...]; zero if none does."""
        return _mean_over_tokens(values, self.token_mask)


def load_balancing_loss(layer: LayerRouting) -> Tensor:
    """`E * sum_i T_i P_i` (HMoE Eq. 3; with first-choice frequencies T the loss of MoDSE and Switch)."""
    top1 = layer.config.load_balancing_counts == "top1"
    frequency = layer.count(layer.logits.argmax(dim=-1, keepdim=True)) if top1 else layer.frequency  # [E]
    return len(layer.expert_sizes) * (frequency * layer.probability).sum()


def parameter_penalty_loss(layer: LayerRouting) -> Tensor:
    """`E * sum_i M_i P_i` with `M_i = T_i * size_i / n` (P-Penalty, HMoE Eq. 4).

    The paper states that equal sizes make this the load-balancing loss. That holds when n is the mean size or the
    largest, not for the printed raw sizes, so n is an option: `"mean"`, `"max"` or `"sum"` of the sizes, or `"none"`
    (n = 1).
    """
    frequency = layer.frequency
    sizes = torch.tensor(layer.expert_sizes, dtype=frequency.dtype, device=frequency.device)  # [E]
    normalizers = {"mean": sizes.mean(), "max": sizes.max(), "sum": sizes.sum(), "none": sizes.new_ones(())}
    share = sizes / normalizers[layer.config.parameter_penalty_normalizer]
    return len(layer.expert_sizes) * (frequency * share * layer.probability).sum()


def router_entropy_loss(layer: LayerRouting) -> Tensor:
    """`-E * sum_i P_i log P_i`, the mean over tokens (HMoE Eq. 5).

    The paper prints the sum without the minus. Minimised, that would raise the entropy, against the stated aim; with
    this sign Top-P does not activate ever more experts.
    """
    log_probability = F.log_softmax(layer.logits, dim=-1)  # [T, E]
    entropy = -(log_probability.exp() * log_probability).sum(dim=-1)  # [T]
    return len(layer.expert_sizes) * layer.mean_over_tokens(entropy)


def router_z_loss(layer: LayerRouting) -> Tensor:
    """Mean over tokens of the squared log-partition `logsumexp(logits)^2` (ST-MoE Eq. 5)."""
    return layer.mean_over_tokens(torch.logsumexp(layer.logits, dim=-1).square())


# The name of a loss is its name in the model's outputs and logs; its coefficient is the config field `<name>_coef`.
ROUTER_LOSSES: dict[str, Callable[[LayerRouting], Tensor]] = {
    "load_balancing_loss": load_balancing_loss,
    "parameter_penalty_loss": parameter_penalty_loss,
    "router_entropy_loss": router_entropy_loss,
    "router_z_loss": router_z_loss,
}


def weighted_router_losses(
    router_logits: Sequence[Tensor],
    router_index: Sequence[Tensor],
    config: HMoEConfig,
    attention_mask: Tensor | None = None,
    *,
    global_batch: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the router losses weighted by the coefficients of the config, and each raw one: means over layers.

    Args:
        router_logits: per layer [T, E], T = batch x sequence; E may differ by layer.
        router_index: per layer [T, K] activated experts.
        attention_mask: [B, S] with S at least the sequence length (the last positions are taken), 0 for padding, which
            then counts nowhere. Masks of another rank than two describe pairs of tokens, not padding, and are ignored.
        global_batch: sum the counts over data-parallel ranks.

    Returns:
        an fp32 scalar, and fp32 scalars by their names in `ROUTER_LOSSES`, of all for which the config has a field.
    """
    coefs = {field.removesuffix("_coef"): coef for field, coef in config.router_loss_coefs_by_field.items()}
    sums = dict.fromkeys(coefs, torch.zeros((), device=router_logits[-1].device))
    for logits, index, sizes in zip(router_logits, router_index, config.layer_expert_sizes):
        mask = _token_mask(attention_mask, logits)
        count = partial(activation_frequency, num_experts=len(sizes), token_mask=mask, reduce=global_batch)
        probability = _mean_over_tokens(F.softmax(logits, dim=-1), mask)
        layer = LayerRouting(config, logits, sizes, mask, probability, count(index), count)
        for name in coefs:
            sums[name] = sums[name] + ROUTER_LOSSES[name](layer).to(sums[name].device)
    terms = {name: value / len(router_logits) for name, value in sums.items()}
    return torch.stack([coef * terms[name] for name, coef in coefs.items()]).sum(), terms


def router_loss_share(
    *,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
    global_batch: bool = False,
    **_,
) -> Tensor | float:
    """What the router losses of this micro-batch are multiplied by, to add up over accumulation steps and ranks.

    `Trainer` divides a sum over labels by `num_items_in_batch`, the labels of all accumulation steps and ranks, so a
    term that is already a mean must count by its share of those labels, or it grows with steps and ranks.

    Args:
        labels: [B, S]; `ignore_index` where nothing is predicted.
        attention_mask: [B, S]; used with `global_batch`.
        num_items_in_batch: None for a plain mean over this micro-batch.
        global_batch: the losses were made with counts over all ranks; then a rank's probabilities count by its share
            of the tokens, which makes the sum over ranks the loss of the concatenated batch exactly.
    """
    predicted = labels[..., 1:] if shift_labels is None else shift_labels
    num_labels = (predicted != ignore_index).sum()
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(num_labels.device)
    if global_batch and dist.is_available() and dist.is_initialized():
        counted = torch.ones_like(labels) if attention_mask is None or attention_mask.dim() != 2 else attention_mask
        counts = torch.stack([num_labels, counted.sum().to(num_labels.device)]).double()
        total = counts.clone()
        dist.all_reduce(total)
        token_share = counts[1] / total[1].clamp(min=1)
        # Without num_items_in_batch the ranks' losses are averaged, not added.
        labels_share = dist.get_world_size() if num_items_in_batch is None else total[0] / num_items_in_batch
        return (token_share * labels_share).float()
    return 1.0 if num_items_in_batch is None else num_labels / num_items_in_batch


def activation_frequency(
    router_index: Tensor, *, num_experts: int, token_mask: Tensor | None = None, reduce: bool = False
) -> Tensor:
    """Share of tokens that activate each expert: `T_i` of HMoE Eq. 3; sums to the mean number of experts per token.

    Args:
        router_index: [T, K] expert ids; the id `num_experts` marks an unused slot.
        token_mask: [T], true where the token counts; None counts all.
        reduce: sum the counts over all ranks of the default process group first (the global batch).

    Returns:
        [E] fp32 without gradient; zeros if no token counts.
    """
    with torch.no_grad():
        num_tokens, num_slots = router_index.shape
        weight = router_index.new_ones(num_tokens) if token_mask is None else token_mask
        weight = weight.to(torch.float32)  # [T]
        slots = weight.unsqueeze(1).expand(num_tokens, num_slots).reshape(-1)  # [T * K]
        counts = torch.zeros(num_experts + 1, device=router_index.device, dtype=torch.float32)
        counts = counts.scatter_add(0, router_index.reshape(-1), slots)  # [E + 1], the last for unused slots
        total = weight.sum()
        if reduce and dist.is_available() and dist.is_initialized():
            packed = torch.cat([counts, total.unsqueeze(0)])
            dist.all_reduce(packed)
            counts, total = packed[:-1], packed[-1]
        return counts[:num_experts] / total.clamp(min=1)


def _mean_over_tokens(values: Tensor, token_mask: Tensor | None) -> Tensor:
    if token_mask is None:
        return values.sum(dim=0) / max(values.shape[0], 1)
    weight = token_mask.to(values.dtype)
    masked = torch.where(token_mask.bool().view(-1, *[1] * (values.dim() - 1)), values, 0)
    return masked.sum(dim=0) / weight.sum().clamp(min=1)


def _token_mask(attention_mask: Tensor | None, logits: Tensor) -> Tensor | None:
    """The [T] mask of tokens that count, or None for all."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    num_positions = logits.shape[0] // max(attention_mask.shape[0], 1)
    return attention_mask[:, attention_mask.shape[1] - num_positions :].reshape(-1).to(logits.device)


class _RouterLogits(tuple):
    """Router logits [T, E] of all layers, with the model's own loss of them given an attention mask."""

    own_loss: Callable[[Tensor | None], Tensor]


def _attach_own_loss(body: Any, _: Any, output: Any) -> None:
    """A forward hook; the tuple of tensors that `return_dict=False` gives holds no router logits by name."""
    logits = getattr(output, "router_logits", None)
    if logits is not None and not isinstance(logits, _RouterLogits):
        own = partial(weighted_router_losses, logits, output.router_index, body.config)
        output.router_logits = _RouterLogits(logits)
        output.router_logits.own_loss = lambda mask: own(mask)[0]


def use_own_router_losses(body: nn.Module) -> None:
    """Makes TRL use the router losses of one model; other models keep theirs.

    TRL fuses head and cross-entropy: it calls the body of any MoE model and hands its router logits to Mixtral's
    `load_balancing_loss_func`. That would train all experts towards equal load whatever the config says. There is no
    way to tell TRL otherwise, so the router logits are made to know their own loss, and that function asks them.
    A causal language model calls this when a trainer of TRL tags it; for a trainer that does not, call
    `model.add_model_tags("trl")`.

    Args:
        body: what TRL calls: the model without its head.
    """
    body.register_forward_hook(_attach_own_loss)
    stock = modeling_mixtral.load_balancing_loss_func
    if hasattr(stock, "asks_router_logits"):
        return

    @functools.wraps(stock)
    def own_or_stock(gate_logits, num_experts=None, top_k=2, attention_mask=None):
        if hasattr(gate_logits, "own_loss"):  # of any copy of this file
            return gate_logits.own_loss(attention_mask)
        return stock(gate_logits, num_experts, top_k, attention_mask)

    own_or_stock.asks_router_logits = True  # type: ignore[attr-defined]
    modeling_mixtral.load_balancing_loss_func = own_or_stock
