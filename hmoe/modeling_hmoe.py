"""HMoE language models: Mixtral with a bank of experts of different sizes, more routers and router losses.

What Mixtral and Qwen3 have (attention, rotary embeddings, norms, caches, masks, heads) is inherited; only the
difference stands here. Papers: HMoE (arXiv 2408.10681), MoDSE (arXiv 2409.12210). This file travels with every saved
checkpoint.

Letters in shapes: B batch, S sequence, T = B * S tokens, H hidden size, E experts, K expert slots per token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.auto import AutoModel
from transformers.models.mixtral.modeling_mixtral import (
    MixtralDecoderLayer,
    MixtralPreTrainedModel,
    MixtralRMSNorm,
    MixtralRotaryEmbedding,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .compat_hmoe import RouterLogits, weighted_router_losses
from .configuration_hmoe import HMoEConfig
from .experts_hmoe import HMoEExperts, check_experts_implementation, default_experts_implementation
from .losses_hmoe import router_loss_share
from .parallel_hmoe import EP_IMPLEMENTATION, check_tiles_divide


@dataclass
class HMoEModelOutputWithPast(ModelOutput):
    """Outputs of [`HMoEModel`].

    Attributes:
        last_hidden_state: [B, S, H].
        router_logits: per layer [T, E], fp32; with `output_router_logits=True`.
        router_index: per layer [T, K], ids of the activated experts; the id E marks an unused Top-P slot; likewise.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    router_index: tuple[Tensor, ...] | None = None


@dataclass
class HMoECausalLMOutputWithPast(ModelOutput):
    """Outputs of [`HMoEForCausalLM`].

    Attributes:
        loss: `lm_loss`, plus the scaled router losses in training.
        logits: [B, S, V].
        lm_loss: cross-entropy alone.
        aux_loss: sum of the router losses weighted by their coefficients; this and the four raw terms are unscaled
            means over this batch, given in training while a coefficient is above zero and with
            `output_router_logits=True`.
        router_logits, router_index: as in [`HMoEModelOutputWithPast`].
    """

    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    router_index: tuple[Tensor, ...] | None = None
    lm_loss: Tensor | None = None
    load_balancing_loss: Tensor | None = None
    parameter_penalty_loss: Tensor | None = None
    router_entropy_loss: Tensor | None = None
    router_z_loss: Tensor | None = None


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


class HMoERouter(nn.Module):
    """Scores every expert for every token, in fp32 under any autocast, and activates some of them."""

    def __init__(self, config: HMoEConfig, layer_idx: int):
        super().__init__()
        self.config = config
        num_experts = len(config.layer_expert_sizes[layer_idx])
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))
        if config.router_type == "modse":
            # MoDSE calls this term noise (Eq. 3-5), yet it is learned and draws nothing at random.
            self.noise_weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))
            self.noise_norm = MixtralRMSNorm(num_experts, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Router logits [T, E], weights [T, K] and expert ids [T, K] of `hidden_states` [T, H]."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            hidden_states = hidden_states.to(dtype)
            logits = F.linear(hidden_states, self.weight.to(dtype))  # [T, E]
            if self.config.router_type == "modse":
                noise = F.softplus(F.linear(hidden_states, self.noise_weight.to(dtype)))  # [T, E]
                logits = logits + self.noise_norm(noise)
            probability = F.softmax(logits, dim=-1)
            if self.config.routing == "top_p":
                weights, index = route_top_p(probability, self.config.router_top_p, self.config.max_experts_per_tok)
            else:
                weights, index = route_top_k(
                    probability, self.config.num_experts_per_tok, normalize=self.config.norm_topk_prob
                )
        return logits, weights, index


class HMoESparseMoeBlock(nn.Module):
    """Router and experts of one layer (HMoE Eq. 6, MoDSE Eq. 6)."""

    def __init__(self, config: HMoEConfig, layer_idx: int):
        super().__init__()
        self.gate = HMoERouter(config, layer_idx)
        self.experts = HMoEExperts(config, layer_idx)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output [B, S, H], router logits [T, E] and expert ids [T, K]."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # [T, H]
        router_logits, weights, index = self.gate(tokens)
        return self.experts(tokens, index, weights).view_as(hidden_states), router_logits, index


class HMoEAttention(Qwen3Attention):
    """Qwen3's attention with its query and key norms optional and Mixtral's sliding window."""

    def __init__(self, config: HMoEConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.sliding_window = config.sliding_window
        if not config.qk_norm:
            self.q_norm = nn.Identity()
            self.k_norm = nn.Identity()


class HMoEDecoderLayer(MixtralDecoderLayer):
    """Mixtral's layer; returns the router's outputs too, so that reentrant gradient checkpointing keeps their
    graph."""

    def __init__(self, config: HMoEConfig, layer_idx: int):
        nn.Module.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = HMoEAttention(config, layer_idx)
        self.mlp = HMoESparseMoeBlock(config, layer_idx)
        self.input_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
        attention_output, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attention_output
        expert_output, router_logits, router_index = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + expert_output, router_logits, router_index


class HMoEPreTrainedModel(MixtralPreTrainedModel):
    config: HMoEConfig
    config_class = HMoEConfig
    _no_split_modules = ["HMoEDecoderLayer"]
    _can_record_outputs = {"hidden_states": HMoEDecoderLayer, "attentions": HMoEAttention}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if issubclass(cls, FSDPModule):
            # FSDP2 gives a model a class of its own, whose name and code `save_pretrained` would write down.
            wrapped = next(base for base in cls.__bases__ if base is not FSDPModule)
            cls.__name__, cls.__module__ = wrapped.__name__, wrapped.__module__

    def __init__(self, config: HMoEConfig, *args, **kwargs):
        config.check()
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, HMoEExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, HMoERouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if self.config.router_type == "modse":
                init.normal_(module.noise_weight, mean=0.0, std=std)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        requested = default_experts_implementation() if requested_experts is None else requested_experts
        check_experts_implementation(requested)
        return requested

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        if distributed_config is not None and distributed_config.ep_size > 1:
            check_tiles_divide(model.config, distributed_config.ep_size)
            if distributed_config.ep_implementation == "auto":
                distributed_config.ep_implementation = EP_IMPLEMENTATION
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs,
    ):
        """As in Transformers, but a broken or incomplete checkpoint is refused rather than partly re-initialised.

        Raises:
            ValueError: a weights file is truncated or corrupt; a tensor of the body is missing or has another shape
                than the config says; a router holds NaN or infinite weights. The message names file or tensor and the
                expectation.
        """
        source = pretrained_model_name_or_path
        if source is None:
            source = "the given state_dict"
        else:
            source = Path(source, kwargs.get("subfolder") or "")
        try:
            # Mismatches are let through to be named below: the error of Transformers names none of them.
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kwargs,
            )
        except SafetensorError as error:
            raise ValueError(_describe_broken_files(source, error)) from error
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{source / SAFE_WEIGHTS_INDEX_NAME} is not valid JSON: {error}. Copy it again"
            ) from error
        _refuse_incomplete(model, info, source)
        if not ignore_mismatched_sizes:
            _refuse_mismatched(info, source)
        return (model, info) if output_loading_info else model


def _describe_broken_files(folder: Path, error: Exception) -> str:
    broken = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as cause:
            broken.append(f"{path} ({path.stat().st_size} bytes): {cause}")
    files = "; ".join(broken) or f"{folder}: {error}"
    return f"broken weights file, truncated or not safetensors: {files}. Download or copy it again"


def _refuse_mismatched(info: dict, source: Path | str) -> None:
    mismatched = [
        f"`{name}` has shape {tuple(found)}, the config asks for {tuple(expected)}"
        for name, found, expected in sorted(info["mismatched_keys"])
    ]
    if mismatched:
        raise ValueError(
            f"{source}: {len(mismatched)} tensors have another shape than the config says: {'; '.join(mismatched)}. "
            "Use the config that the checkpoint was saved with, or ignore_mismatched_sizes=True to start them anew"
        )


def _refuse_incomplete(model: HMoEPreTrainedModel, info: dict, source: Path | str) -> None:
    prefix = f"{model.base_model_prefix}."
    # A new task head on a pretrained body is what fine-tuning starts from; a causal LM has no new head.
    needed = {
        name
        for name in info["missing_keys"]
        if name.startswith(prefix) or isinstance(model, (HMoEModel, HMoEForCausalLM))
    }
    if needed:
        unexpected = sorted(info["unexpected_keys"])
        hint = f"; it holds unknown tensors instead: {_first_names(unexpected)}" if unexpected else ""
        raise ValueError(
            f"{source} lacks {len(needed)} tensors that its config asks for: {_first_names(sorted(needed))}{hint}. "
            "The checkpoint is incomplete or of another model: save or download it again"
        )
    for name, parameter in model.named_parameters():
        if ".mlp.gate." in name and parameter.device.type != "meta" and not torch.isfinite(parameter).all():
            count = int((~torch.isfinite(parameter)).sum())
            raise ValueError(
                f"{source}: router tensor `{name}` {tuple(parameter.shape)} holds {count} NaN or infinite values; "
                "every value must be finite. The run that saved it had diverged: load an earlier checkpoint"
            )


def _first_names(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"`{name}`" for name in names[:limit]) + more


class HMoEModel(HMoEPreTrainedModel):
    """The decoder without a head."""

    _auto_class = "AutoModel"

    def __init__(self, config: HMoEConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([HMoEDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MixtralRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> HMoEModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of `input_ids` and `inputs_embeds`")
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
            position_ids = positions.unsqueeze(0)

        make_mask = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
        causal_mask = make_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = inputs_embeds  # [B, S, H]
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        router_logits: tuple[Tensor, ...] = ()
        router_index: tuple[Tensor, ...] = ()
        for layer in self.layers:
            hidden_states, layer_logits, layer_index = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            if output_router_logits:
                router_logits += (layer_logits,)
                router_index += (layer_index,)
        return HMoEModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            router_logits=RouterLogits.of(router_logits, router_index, self.config) if output_router_logits else None,
            router_index=router_index or None,
        )


class HMoEForCausalLM(HMoEPreTrainedModel, GenerationMixin):
    """The language model: cross-entropy plus, in training, the router losses of the config."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: HMoEConfig):
        super().__init__(config)
        self.model = HMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> HMoECausalLMOutputWithPast:
        """Next-token logits and, with `labels` [B, S] (-100 where nothing is predicted), the loss.

        Router losses join the loss in training only, whatever `output_router_logits` says, so evaluation reports pure
        perplexity. With `num_items_in_batch` (as `Trainer` gives it) they are scaled by this batch's share of the
        labels, so that neither gradient accumulation nor the number of ranks changes their gradient.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        trains_router = labels is not None and self.training and self.config.has_router_losses
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits or trains_router,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))

        lm_loss = loss = aux_loss = None
        terms: dict[str, Tensor] = {}
        if labels is not None:
            lm_loss = loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        if output_router_logits or trains_router:
            global_batch = trains_router and self.config.router_loss_scope == "global_batch"
            # Hooks around the body, such as those of DeepSpeed ZeRO-3, rebuild tuples without their attributes.
            aux_loss, terms = weighted_router_losses(
                outputs.router_logits, outputs.router_index, self.config, attention_mask, global_batch=global_batch
            )
        if trains_router:
            share = router_loss_share(
                labels=labels,
                attention_mask=attention_mask,
                global_batch=self.config.router_loss_scope == "global_batch",
                **kwargs,
            )
            loss = lm_loss + self.config.router_aux_loss_coef * share * aux_loss.to(lm_loss.device)

        return HMoECausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
            router_index=outputs.router_index if output_router_logits else None,
            lm_loss=lm_loss,
            **terms,
        )


class HMoEForSequenceClassification(GenericForSequenceClassification, HMoEPreTrainedModel):
    _auto_class = "AutoModelForSequenceClassification"


class HMoEForTokenClassification(GenericForTokenClassification, HMoEPreTrainedModel):
    _auto_class = "AutoModelForTokenClassification"


class HMoEForQuestionAnswering(GenericForQuestionAnswering, HMoEPreTrainedModel):
    _auto_class = "AutoModelForQuestionAnswering"


# The generic heads above build their body through AutoModel, in a checkpoint's own copy of this file too.
AutoModel.register(HMoEConfig, HMoEModel, exist_ok=True)

__all__ = [
    "HMoEForCausalLM",
    "HMoEForQuestionAnswering",
    "HMoEForSequenceClassification",
    "HMoEForTokenClassification",
    "HMoEModel",
    "HMoEPreTrainedModel",
]
