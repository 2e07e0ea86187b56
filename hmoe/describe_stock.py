"""What `hmoe describe` says of models of other types: counted on a model without tensors, not computed from fields."""

from __future__ import annotations

from typing import Any

from .describe import BYTES, TRAINING_BYTES_PER_PARAMETER, Description, activation_elements, check_sizes


def described_types() -> tuple[str, ...]:
    """Those that `hmoe convert` reads: their attention and FFN are of one form."""
    from hmoe.conversion.families import DENSE_FAMILIES, MOE_FAMILIES

    return (*MOE_FAMILIES, *DENSE_FAMILIES)


def describe_stock(
    config: Any,
    *,
    context: int | None = None,
    batch_size: int = 1,
    dtype: str = "bfloat16",
    experts_per_token: float | None = None,
) -> Description:
    """As [`hmoe.describe.describe`], for one of [`described_types`]; a dense model has no layers of experts.

    Raises:
        ValueError: for an argument that cannot be, or a sliding window on some layers only.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from hmoe.costs import forward_flops
    from hmoe.routers import routed_layers

    context = config.max_position_embeddings if context is None else context
    check_sizes(context, batch_size, dtype)
    if experts_per_token is not None:
        raise ValueError(
            f"`experts_per_token`={experts_per_token} is for Top-P routing, which {config.model_type!r} does not "
            "have: leave it out"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and "full_attention" in (getattr(config, "layer_types", None) or []):
        raise ValueError(
            f"`sliding_window`={window} on some layers only cannot be described: make it one for all with "
            "`use_sliding_window` in config.json, if all contexts are shorter than it"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = routed_layers(model)
    per_token = config.num_experts_per_tok if layers else 0
    parameters = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(sum(layer.parameters) for layer in layers)
    used = sum(per_token * layer.parameters[0] for layer in layers)
    ratio = used / experts if layers else 1.0
    widths = _attention_widths(config)
    elements = activation_elements(
        config.hidden_size, config.vocab_size, widths, _ffn_elements(model, per_token), batch_size * context
    )
    keys = context if window is None else min(context, window)
    return Description(
        layer_sizes=[layer.sizes for layer in layers],
        tile_size=None,
        num_tiles=[],
        routing="top_k" if layers else "dense",
        experts_per_token=float(per_token),
        parameters=parameters,
        expert_parameters=experts,
        activated=float(parameters - experts + used),
        activated_min=parameters - experts + used,
        activated_max=parameters - experts + used,
        activated_inverse_size=float(parameters - experts + used),
        activated_ratio=ratio,
        activated_ratio_inverse_size=ratio,
        flops_per_token=forward_flops(model).count(1, context),
        weight_bytes=parameters * BYTES[dtype],
        kv_cache_bytes=2 * BYTES[dtype] * batch_size * keys * config.num_hidden_layers * widths[1],
        train_state_bytes=parameters * TRAINING_BYTES_PER_PARAMETER,
        activation_bytes=4 * elements[0],
        activation_bytes_checkpointing=4 * elements[1],
    )


def _attention_widths(config: Any) -> tuple[int, int]:
    """Of queries and of keys."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * head_dim, (config.num_key_value_heads or heads) * head_dim


def _ffn_elements(model: Any, per_token: int) -> list[float]:
    """Elements that autograd keeps of a token, by layer; mixtures may have dense layers.

    Stock FFNs keep gate and up projections, their product and the activation, where HMoE's backward keeps the first
    two; stock experts also keep their copies of the input and their outputs.
    """
    from hmoe.routers import routed_layers

    config = model.config
    sizes = {id(layer.router): layer.sizes[0] for layer in routed_layers(model)}
    normed = hasattr(model.model.layers[0].self_attn, "q_norm")
    norms = 2 * sum(_attention_widths(config)) if normed else 0  # input and normalised input
    return [
        norms + per_token * (4 * sizes[id(layer.mlp.gate)] + 2 * config.hidden_size)
        if hasattr(layer.mlp, "experts")
        else norms + 4 * layer.mlp.up_proj.out_features
        for layer in model.model.layers
    ]
