"""TRL's trainers get the router losses of HMoE models.

TRL fuses head and cross-entropy: it calls the body of any MoE model and hands its router logits to Mixtral's
`load_balancing_loss_func`. That would train all experts towards equal load whatever the config says. There is no way
to tell TRL otherwise, so the router logits are made to know their own loss, and that function asks them for it.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.models.mixtral import modeling_mixtral


class _RouterLogits(tuple):
    """Router logits [T, E] of all layers, with the model's own loss of them given an attention mask."""

    own_loss: Callable[[Tensor | None], Tensor]


def _attach_own_loss(body: nn.Module, _: Any, output: Any, weighted_router_losses: Callable[..., Any]) -> None:
    """A forward hook; the tuple of tensors that `return_dict=False` gives holds no router logits by name."""
    logits, index = getattr(output, "router_logits", None), getattr(output, "router_index", None)
    if logits is not None and not isinstance(logits, _RouterLogits):
        output.router_logits = _RouterLogits(logits)
        output.router_logits.own_loss = lambda mask: weighted_router_losses(logits, index, body.config, mask)[0]


def use_own_router_losses(body: nn.Module, weighted_router_losses: Callable[..., Any]) -> None:
    """Makes TRL use the router losses of one model; other models keep theirs.

    A causal language model calls this when a trainer of TRL tags it. For a trainer that does not, call
    `model.add_model_tags("trl")`.

    Args:
        body: what TRL calls: the model without its head.
        weighted_router_losses: that of the code which defines the model, the package's or a checkpoint's.
    """
    body.register_forward_hook(partial(_attach_own_loss, weighted_router_losses=weighted_router_losses))
    stock = modeling_mixtral.load_balancing_loss_func
    if hasattr(stock, "asks_router_logits"):
        return

    @functools.wraps(stock)
    def own_or_stock(
        gate_logits: Any, num_experts: int | None = None, top_k: int = 2, attention_mask: Tensor | None = None
    ) -> Tensor | int:
        if isinstance(gate_logits, _RouterLogits):
            return gate_logits.own_loss(attention_mask)
        return stock(gate_logits, num_experts, top_k, attention_mask)

    own_or_stock.asks_router_logits = True  # type: ignore[attr-defined]
    modeling_mixtral.load_balancing_loss_func = own_or_stock
