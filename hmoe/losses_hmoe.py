"""Router losses of HMoE (arXiv 2408.10681), MoDSE (arXiv 2409.12210) and ST-MoE (arXiv 2202.08906): pure functions.

Each loss is of one layer; [`router_losses`] takes the mean over layers. Counts carry no gradient: it flows through the
router's probabilities alone. This file travels with every saved checkpoint, so it imports only torch.

Letters in shapes: T tokens, E experts, K expert slots per token (an unused slot holds the id E).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def activation_frequency(
    router_index: Tensor, *, num_experts: int, token_mask: Tensor | None = None, reduce: bool = False
) -> Tensor:
    """Share of tokens that activate each expert: `T_i` of HMoE Eq. 3; sums to the mean number of experts per token.

    Args:
        router_index: [T, K] expert ids; the id `num_experts` marks an unused slot.
        token_mask: [T], true where the token counts; None counts all.
        reduce: sum the counts over all ranks of the default process group first (the global batch).

    Returns:
        [E] fp32; zeros if no token counts.
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


def mean_over_tokens(values: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
    """Mean of `values` [T, ...] over the tokens that count, [...]; zero if none does."""
    if token_mask is None:
        return values.sum(dim=0) / max(values.shape[0], 1)
    weight = token_mask.to(values.dtype)
    masked = torch.where(token_mask.bool().view(-1, *[1] * (values.dim() - 1)), values, 0)
    return masked.sum(dim=0) / weight.sum().clamp(min=1)


def load_balancing_loss(*, frequency: Tensor, probability: Tensor) -> Tensor:
    """`E * sum_i T_i P_i` (HMoE Eq. 3; with first-choice frequencies the loss of MoDSE and Switch).

    Args:
        frequency: [E], share of tokens that activate each expert, no gradient.
        probability: [E], mean router probability of each expert.
    """
    return frequency.numel() * (frequency * probability).sum()


def parameter_penalty_loss(
    *, frequency: Tensor, probability: Tensor, expert_sizes: Sequence[int], normalizer: str = "mean"
) -> Tensor:
    """`E * sum_i M_i P_i` with `M_i = T_i * size_i / n` (P-Penalty, HMoE Eq. 4).

    The paper states that equal sizes make this the load-balancing loss; that holds for n = the mean size (and the
    largest),
    not for its printed raw sizes, so n is an option: `"mean"`, `"max"`, `"sum"` of the sizes, or `"none"` (n = 1).
    """
    sizes = torch.tensor(expert_sizes, dtype=frequency.dtype, device=frequency.device)  # [E]
    scale = {"mean": sizes.mean(), "max": sizes.max(), "sum": sizes.sum(), "none": sizes.new_ones(())}[normalizer]
    return load_balancing_loss(frequency=frequency * (sizes / scale), probability=probability)


def router_entropy_loss(*, router_logits: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """`-E * sum_i P_i log P_i`, the mean over tokens (HMoE Eq. 5).

    The paper prints the sum without the minus, which when minimised raises the entropy, against its stated aim; the
    sign here is the one that keeps Top-P from activating ever more experts.

    Args:
        router_logits: [T, E] raw logits in fp32.
    """
    log_probability = F.log_softmax(router_logits, dim=-1)  # [T, E]
    entropy = -(log_probability.exp() * log_probability).sum(dim=-1)  # [T]
    return router_logits.shape[-1] * mean_over_tokens(entropy, token_mask=token_mask)


def router_z_loss(*, router_logits: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of the squared log-partition `logsumexp(logits)^2` (ST-MoE Eq. 5)."""
    return mean_over_tokens(torch.logsumexp(router_logits, dim=-1).square(), token_mask=token_mask)


def router_losses(
    *,
    router_logits: Sequence[Tensor],
    router_index: Sequence[Tensor],
    expert_sizes: Sequence[Sequence[int]],
    attention_mask: Tensor | None = None,
    load_balancing_counts: str = "activated",
    parameter_penalty_normalizer: str = "mean",
    global_batch: bool = False,
) -> dict[str, Tensor]:
    """The four raw (unweighted) router losses, each the mean over layers.

    Args:
        router_logits: per layer [T, E], T = batch x sequence; E may differ by layer.
        router_index: per layer [T, K] activated experts.
        expert_sizes: per layer, per expert.
        attention_mask: [B, S] with S at least the sequence length (the last positions are taken), 0 for padding, which
            then counts nowhere. Masks of other ranks describe pairs of tokens, not padding, and are ignored.
        load_balancing_counts: `"activated"` (HMoE) or `"top1"` (MoDSE).
        global_batch: sum the counts over data-parallel ranks.

    Returns:
        `load_balancing_loss`, `parameter_penalty_loss`, `router_entropy_loss`, `router_z_loss`: fp32 scalars.
    """
    device = router_logits[-1].device
    sums: dict[str, Tensor] = {}
    for logits, index, sizes in zip(router_logits, router_index, expert_sizes):
        mask = _token_mask(attention_mask, logits)
        probability = mean_over_tokens(F.softmax(logits, dim=-1), token_mask=mask)  # [E]
        count = partial(activation_frequency, num_experts=len(sizes), token_mask=mask, reduce=global_batch)
        activated = count(index)  # [E]
        balanced = activated
        if load_balancing_counts == "top1":
            balanced = count(logits.argmax(dim=-1, keepdim=True))  # [E]
        layer = {
            "load_balancing_loss": load_balancing_loss(frequency=balanced, probability=probability),
            "parameter_penalty_loss": parameter_penalty_loss(
                frequency=activated,
                probability=probability,
                expert_sizes=sizes,
                normalizer=parameter_penalty_normalizer,
            ),
            "router_entropy_loss": router_entropy_loss(router_logits=logits, token_mask=mask),
            "router_z_loss": router_z_loss(router_logits=logits, token_mask=mask),
        }
        for name, value in layer.items():
            sums[name] = sums.get(name, 0) + value.to(device)
    return {name: value / len(router_logits) for name, value in sums.items()}


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


def _token_mask(attention_mask: Tensor | None, logits: Tensor) -> Tensor | None:
    """The [T] mask of tokens that count, or None for all."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    num_positions = logits.shape[0] // max(attention_mask.shape[0], 1)
    return attention_mask[:, attention_mask.shape[1] - num_positions :].reshape(-1).to(logits.device)
