"""What a causal language model costs: parameters, FLOPs and memory, counted from the shapes of its parameters.

One way of counting serves every model type. From a config the model is made on the meta device, which allocates
nothing; routing enters as a load, the share of tokens that activate each expert.

A multiply and an add are two FLOPs. Two conventions:

| | `"matmul"` (default) | `"6nd"` |
|---|---|---|
| a matrix of n entries, per token that passes it | 2n | 2n |
| input embedding, norms | 0: no product | 2n, as any parameter |
| attention scores and values, per token | 4 x heads x head_dim x keys, in every layer | 0 |
| an expert of n parameters (size I: n = 3 H I) | 2n per token that activates it | the same |
| training | 3 x forward | 3 x forward |

`"matmul"` equals a literal count of the products a forward pass computes; masked attention scores count, recomputation
under gradient checkpointing does not, padding does. `"6nd"` is C = 6 N_activated D, with both embeddings in N, as
HMoE (arXiv 2408.10681) counts activated parameters; its budgets of 7e19 and 2.6e20 FLOPs are read so here, because the
paper does not say what it counts. For HMoE-0.4B with 4096 tokens of context `"matmul"` counts a third more per token.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hmoe.routers import RoutedLayer, routed_layers, shape_of, text_config


CONVENTIONS = ("matmul", "6nd")
# Backward computes two products, for inputs and for weights, where forward computes one.
TRAIN_FACTOR = 3
PARTS = ("embedding", "attention", "norms", "router", "ffn", "adapters", "unrouted")
# Per MoE layer, per expert, the share of tokens that activate it; a layer sums to its experts per token.
Load = Sequence[Sequence[float]]

# The parameters of a decoder whose FLOPs and memory [`ModelCosts`] gives: softmax attention with one projection each
# for queries, keys and values; dense FFNs, shared experts, and banks of routed experts.
_KNOWN_PARAMETERS = re.compile(
    r"model\.embed_tokens\.weight|lm_head\.(weight|bias)|model\.norm\.(weight|bias)|model\.layers\.\d+\.("
    r"\w*norm\.(weight|bias)"
    r"|self_attn\.([qkvo]_proj|\w*norm)\.(weight|bias)"
    r"|mlp\.((shared_experts?\.)?(gate|up|down)_proj\.(weight|bias)|\w*norm\.weight|gate\..+|shared_expert_gate\.weight"
    r"|experts\.(gate_up_proj|down_proj|act_fn\.weight)))"
)


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of a forward pass by their cause; [`ModelCosts.forward_flops`] makes it.

    Attributes:
        per_token: of every token, whatever its routing.
        per_key: of every pair of a token and a position that its attention scores, over all layers.
        window: most positions that a token scores, with sliding-window attention.
        per_expert: per layer, per expert, of a token that activates it.
        experts_per_token: experts that a token activates in a layer, where it is the same for all tokens; else None.
    """

    per_token: int
    per_key: int
    window: int | None
    per_expert: list[list[int]]
    experts_per_token: int | None

    def shared(self, num_tokens: int, length: int) -> int:
        """Of everything but the experts, for `num_tokens` tokens in sequences of `length`."""
        keys = length if self.window is None else min(length, self.window)
        return num_tokens * (self.per_token + self.per_key * keys)

    def count(self, num_tokens: int, length: int, expert_tokens: Load | None = None) -> float:
        """Of `num_tokens` tokens in sequences of `length`.

        Args:
            expert_tokens: per layer, per expert, how many tokens activate it. Default: every expert equally often,
                which is exact for equal sizes; with Top-P then one expert per token, a lower estimate.
        """
        if expert_tokens is None:
            expert_tokens = equal_load(self.per_expert, num_tokens * (self.experts_per_token or 1))
        return self.shared(num_tokens, length) + _weighted_sum(expert_tokens, self.per_expert)

    def least(self, num_tokens: int, length: int) -> int:
        """The fewest that any routing can cost: all tokens on the smallest experts."""
        chosen = self.experts_per_token or 1
        experts = sum(sum(sorted(row)[:chosen]) for row in self.per_expert)
        return self.shared(num_tokens, length) + num_tokens * experts


@dataclass(frozen=True)
class ModelCosts:
    """The counts of one model, from which every cost follows; [`model_costs`] makes it.

    Attributes:
        parameters: all of them; tied ones count once.
        parts: parameters outside the experts: `embedding` (input and, unless tied, output), `attention`, `norms`,
            `router` (learnable activations of experts included), `ffn` (dense ones and shared experts), `adapters`
            (LoRA, and originals of modules that PEFT trains whole), `unrouted` (banks of experts whose routers are
            not known).
        sizes, expert_parameters: neurons and parameters, per MoE layer, per expert.
        expert_flops: forward, per MoE layer, per expert, of a token that activates it.
        matrix_flops: forward, of a token, of all matrices outside the experts.
        attention_width, key_width: heads x head_dim of queries, and of keys.
        window: most positions that a token's attention scores; None for all.
        routing: `top_k`, `top_p` or `dense`.
        experts_per_token: that a token activates in a layer; None where the data decide (Top-P).
        max_experts_per_token: the most.
        kept: per decoder layer, elements that autograd keeps of a token: always, and for each expert it activates.
        not_counted: what the FLOPs and the memory of this model leave out, with the reason; None if they are right.
    """

    hidden_size: int
    vocab_size: int
    num_layers: int
    parameters: int
    parts: dict[str, int]
    sizes: list[list[int]]
    expert_parameters: list[list[int]]
    expert_flops: list[list[int]]
    matrix_flops: int
    attention_width: int
    key_width: int
    window: int | None
    routing: str
    experts_per_token: int | None
    max_experts_per_token: int
    kept: list[tuple[float, float]] = field(repr=False)
    not_counted: str | None

    def activated_parameters(self, load: Load) -> float:
        """Parameters that a token uses on average: everything but the experts, plus the experts by `load`."""
        return float(self._shared_parameters + _weighted_sum(load, self.expert_parameters))

    def activated_ratio(self, load: Load) -> float:
        """Activated share of the expert parameters (HMoE Table 2); 1 without experts."""
        experts = sum(map(sum, self.expert_parameters))
        return _weighted_sum(load, self.expert_parameters) / experts if experts else 1.0

    def activated_bounds(self) -> tuple[int, int]:
        """The fewest and the most parameters that one token can use."""
        fewest, most = self.experts_per_token or 1, self.max_experts_per_token
        rows = [sorted(row) for row in self.expert_parameters]
        least, greatest = (sum(sum(row[:fewest]) for row in rows), sum(sum(row[-most:]) for row in rows))
        return self._shared_parameters + least, self._shared_parameters + greatest

    @property
    def _shared_parameters(self) -> int:
        return self.parameters - sum(map(sum, self.expert_parameters))

    def forward_flops(self, convention: str = "matmul") -> ForwardFlops:
        """FLOPs under a convention; adapters are left out.

        Raises:
            ValueError: for a convention that does not exist.
        """
        if convention not in CONVENTIONS:
            raise ValueError(f"`flops_convention` must be one of {list(CONVENTIONS)}, got {convention!r}")
        parameters = sum(self.parts.values()) - self.parts["adapters"] - self.parts["unrouted"]
        is_matmul = convention == "matmul"
        return ForwardFlops(
            per_token=self.matrix_flops if is_matmul else 2 * parameters,
            per_key=4 * self.num_layers * self.attention_width if is_matmul else 0,
            window=self.window,
            per_expert=self.expert_flops,
            experts_per_token=self.experts_per_token,
        )

    def cache_elements(self, context: int) -> int:
        """Keys and values that a sequence of `context` tokens leaves in the cache."""
        keys = context if self.window is None else min(context, self.window)
        return 2 * keys * self.num_layers * self.key_width

    def activation_elements(self, tokens: int, experts_per_token: float) -> tuple[int, int]:
        """Elements kept for backward: without gradient checkpointing, and with (the input of every layer, and one
        layer at a time). An estimate: no temporary buffers, no overhead of the allocator."""
        layers = [always + experts_per_token * per_expert for always, per_expert in self.kept]
        head = 3 * self.hidden_size + 2 * self.vocab_size
        with_checkpointing = len(layers) * self.hidden_size + max(layers) + head
        return round(tokens * (sum(layers) + head)), round(tokens * with_checkpointing)


def model_costs(source: Any) -> ModelCosts:
    """Counts a model, or the causal language model that a config describes; equal configs are counted once.

    Parameters may be on the meta device, or left empty by DeepSpeed ZeRO-3.

    Raises:
        ValueError: for a config that is of no causal language model of Transformers.
    """
    if isinstance(source, nn.Module):
        return _count(source)
    return _costs_of_config(source.to_json_string(use_diff=False))


def moe_costs(model: nn.Module) -> ModelCosts:
    """As [`model_costs`], of a mixture of experts.

    Raises:
        ValueError: if the model has no MoE layer.
    """
    costs = model_costs(model)
    if not costs.sizes:
        config = text_config(model)
        raise ValueError(
            f"{getattr(config, '_name_or_path', '') or type(model).__name__} (model type "
            f"{config.model_type!r}) is not a mixture of experts: no layer has a router `gate` beside a bank of "
            "`experts`. Give an HMoE, Mixtral, Qwen-MoE or OLMoE model; a dense model can be the baseline"
        )
    return costs


@lru_cache(maxsize=64)
def _costs_of_config(text: str) -> ModelCosts:
    fields = json.loads(text)
    # A checkpoint's own copy of HMoE's config is another class of the same type.
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"models of type {config.model_type!r} are no causal language models: give one that is")
    with torch.device("meta"):
        return _count(AutoModelForCausalLM.from_config(config))


def _count(model: nn.Module) -> ModelCosts:
    config, layers = text_config(model), routed_layers(model)
    heads = getattr(config, "num_attention_heads", 0)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    widths = heads * head_dim, (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    sizes = [layer.sizes for layer in layers]
    parts, matrix_flops, unrouted = _count_parts(model, layers)
    routing = getattr(config, "routing", "top_k") if layers else "dense"
    chosen = getattr(config, "num_experts_per_tok", None) if layers or unrouted else 0
    most = getattr(config, "max_experts_per_tok", None) or max(map(len, sizes), default=0)
    return ModelCosts(
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        parameters=sum(parts.values()) + sum(sum(layer.parameters) for layer in layers),
        parts=parts,
        sizes=sizes,
        expert_parameters=[layer.parameters for layer in layers],
        expert_flops=[[2 * count for count in layer.parameters] for layer in layers] or unrouted,
        matrix_flops=matrix_flops,
        attention_width=widths[0],
        key_width=widths[1],
        window=_window(config),
        routing=routing,
        experts_per_token=None if routing == "top_p" else chosen,
        max_experts_per_token=most if routing == "top_p" else chosen or 0,
        kept=_kept_elements(model, config, widths, sizes),
        not_counted=_not_counted(model, config, widths, bool(layers)),
    )


def _count_parts(model: nn.Module, layers: list[RoutedLayer]) -> tuple[dict[str, int], int, list[list[int]]]:
    """Parameters outside the experts of `layers` by part; FLOPs of their matrices; and, in a mixture of another form,
    the FLOPs of each expert, per bank of experts."""
    routers = {id(module) for layer in layers for module in layer.router.modules()}
    parts = dict.fromkeys(PARTS, 0)
    matrix_flops, unrouted = 0, []
    seen: set[int] = set()
    for name, module in model.named_modules():
        shapes = {id(parameter): shape_of(parameter) for parameter in module.parameters(recurse=False)}
        rows = [shape for shape in shapes.values() if len(shape) == 3]
        is_bank = bool(rows) and not isinstance(module, nn.Conv1d)
        if is_bank and not layers:
            unrouted.append([2 * sum(math.prod(shape[1:]) for shape in rows)] * rows[0][0])
        part = _part(name, module, id(module) in routers)
        for key, shape in shapes.items():
            is_expert = is_bank and len(shape) >= 2
            if key not in seen and not (is_expert and layers):
                parts["unrouted" if is_expert else part] += math.prod(shape)
            seen.add(key)
            if len(shape) >= 2 and part != "adapters" and not is_expert and not isinstance(module, nn.Embedding):
                matrix_flops += 2 * math.prod(shape)
    return parts, matrix_flops, unrouted


def _part(name: str, module: nn.Module, is_router: bool) -> str:
    # PEFT keeps the original of a module that it trains whole, and does not compute it.
    if "lora_" in name or ".original_module" in name:
        return "adapters"
    if is_router or ("experts." in name and "act_fn" in name):
        return "router"
    if isinstance(module, nn.Embedding) or "lm_head" in name:
        return "embedding"
    if "norm" in type(module).__name__.lower():
        return "norms"
    return "attention" if "attn" in name else "ffn"


def _kept_elements(
    model: nn.Module, config: Any, widths: tuple[int, int], sizes: list[list[int]]
) -> list[tuple[float, float]]:
    """[`ModelCosts.kept`], from the names of parameters."""
    # Two norms keep input, normalised input and output; attention keeps q, k, v and its output.
    always = 6 * config.hidden_size + 2 * sum(widths)
    layers: dict[str, list[float]] = {}
    rows = iter(sizes)
    for name, parameter in model.named_parameters():
        if not (match := re.match(r"model\.layers\.(\d+)\.(.+)", name)):
            continue
        kept = layers.setdefault(match[1], [always, 0])
        if match[2] == "mlp.experts.down_proj" and (row := next(rows, None)):
            # Stock experts keep gate and up projections, their product, the activation, and copies of inputs and
            # outputs; HMoE's backward keeps the first two.
            mean = sum(row) / len(row)
            kept[1] = 2 * mean if hasattr(config, "layer_expert_sizes") else 4 * mean + 2 * config.hidden_size
        elif re.fullmatch(r"mlp\.(\w+\.)?(gate|up)_proj\.weight", match[2]):
            kept[0] += 2 * shape_of(parameter)[0]
        elif re.fullmatch(r"self_attn\.[qk]_norm\.weight", match[2]):  # input and normalised input
            kept[0] += 2 * widths["k_norm" in match[2]]
    return [(kept, per_expert) for kept, per_expert in layers.values()]


def _window(config: Any) -> int | None:
    only_full = set(getattr(config, "layer_types", None) or ()) == {"full_attention"}
    return None if only_full else getattr(config, "sliding_window", None) or None


def _not_counted(model: nn.Module, config: Any, widths: tuple[int, int], has_experts: bool) -> str | None:
    types = set(getattr(config, "layer_types", None) or ())
    if (window := _window(config)) and "full_attention" in types:
        return (
            f"`sliding_window`={window} on some layers only cannot be described: make it one for all with "
            "`use_sliding_window` in config.json, if all contexts are shorter than it"
        )
    if has_experts and getattr(config, "num_experts_per_tok", None) is None:
        return "the config does not name its `num_experts_per_tok`"
    if others := types - {"full_attention", "sliding_attention"}:
        return f"attention of type {', '.join(sorted(others))} is not known"
    shapes = {"q_proj.weight": widths[0], "k_proj.weight": widths[1], "v_proj.weight": widths[1]}
    for name, parameter in model.named_parameters():
        width = shapes.get(name.partition("self_attn.")[2])
        if not _KNOWN_PARAMETERS.fullmatch(name) or width not in (None, shape_of(parameter)[0]):
            return (
                f"`{name}` {list(shape_of(parameter))} is not known: only decoders are whose attention has one "
                "projection each for queries, keys and values, with FFNs `gate_proj`, `up_proj` and `down_proj`, or "
                "a router `gate` and a bank of `experts`"
            )
    return None


def equal_load(rows: Sequence[Sequence[Any]], experts_per_token: float) -> list[list[float]]:
    """The load, for rows as long as the layers have experts, if every expert is activated equally often."""
    return [[experts_per_token / len(row)] * len(row) for row in rows]


def inverse_size_load(sizes: Sequence[int], experts_per_token: float) -> list[float]:
    """Shares of tokens proportional to 1 / size that sum to `experts_per_token`; no share above 1."""
    load, remaining = [0.0] * len(sizes), experts_per_token
    smallest_first = sorted(range(len(sizes)), key=lambda expert: sizes[expert])
    for place, expert in enumerate(smallest_first):
        inverses = sum(1 / sizes[other] for other in smallest_first[place:])
        load[expert] = min(remaining / (sizes[expert] * inverses), 1.0)
        remaining -= load[expert]
    return load


def _weighted_sum(load: Load, rows: Load) -> float:
    pairs = zip(load, rows, strict=True)
    return sum(share * value for shares, row in pairs for share, value in zip(shares, row, strict=True))


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a causal language model, as [`count_parameters`] finds them.

    Attributes:
        total: all parameters; tied embeddings count once.
        embedding: input embedding and, unless tied, the output head.
        attention, norms, router: sums over layers (`norms` with the final one; `router` with learnable activations).
        experts: per layer, per expert.
        activated: parameters one token uses on average: everything but the experts, plus the experts by their load.
        activated_min, activated_max: the least and the most that one token can use.
    """

    total: int
    embedding: int
    attention: int
    norms: int
    router: int
    experts: list[list[int]]
    activated: float
    activated_min: int
    activated_max: int

    @property
    def activated_ratio(self) -> float:
        """Activated share of the expert parameters (HMoE Table 2)."""
        experts = sum(map(sum, self.experts))
        return (self.activated - (self.total - experts)) / experts


def count_parameters(config: Any, load: Load | None = None) -> ParameterCounts:
    """Counts the parameters of `HMoEForCausalLM(config)`, embeddings included, as the papers do.

    Args:
        load: per layer, per expert, the share of tokens that activate it (sums to the experts per token); default:
            equal load, of `num_experts_per_tok` experts with Top-K. With Top-P the number of experts depends on the
            data, so without `load` every expert is taken as equally likely and one is activated: a lower bound.

    Raises:
        ValueError: if `load` does not have the layers and experts of the config.
    """
    costs = model_costs(config)
    num_experts = [len(sizes) for sizes in costs.sizes]
    if load is None:
        load = equal_load(costs.sizes, costs.experts_per_token or 1)
    if [len(row) for row in load] != num_experts:
        raise ValueError(f"`load` has {[len(row) for row in load]} experts per layer, the config has {num_experts}")
    fewest, most = costs.activated_bounds()
    return ParameterCounts(
        total=costs.parameters,
        **{name: costs.parts[name] for name in ("embedding", "attention", "norms", "router")},
        experts=[list(row) for row in costs.expert_parameters],
        activated=costs.activated_parameters(load),
        activated_min=fewest,
        activated_max=most,
    )


def abbreviated(count: float | None) -> str:
    """A count for people, such as `4.173 M`; `-` for None."""
    if count is None:
        return "-"
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.4g} {unit}"
    return f"{count:.4g}"
