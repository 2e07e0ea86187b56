"""HMoE language models: Mixtral with a bank of experts of different sizes, more routers and router losses.

What Mixtral and Qwen3 have (attention, rotary embeddings, norms, caches, masks, heads) is inherited; only the
difference stands here. Papers: HMoE (arXiv 2408.10681), MoDSE (arXiv 2409.12210). This file travels with every saved
checkpoint.

Letters in shapes: B batch, S sequence, T = B * S tokens, H hidden size, E experts, K expert slots per token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.dynamic_module_utils import custom_object_save
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
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

from .configuration_hmoe import HMoEConfig
from .experts_hmoe import HMoEExperts, choose_experts_implementation
from .parallel_hmoe import EP_IMPLEMENTATION, check_tiles_divide
from .routing_hmoe import (
    ROUTERS,
    HMoERouter,
    router_loss_share,
    use_own_router_losses,
    weighted_router_losses,
)


@dataclass
class HMoEModelOutputWithPast(MoeModelOutputWithPast):
    """Outputs of [`HMoEModel`].

    Attributes:
        last_hidden_state: [B, S, H].
        router_logits: per layer [T, E], fp32; with `output_router_logits=True`.
        router_index: per layer [T, K], ids of the activated experts; the id E marks an unused Top-P slot; likewise.
    """

    router_index: tuple[Tensor, ...] | None = None


@dataclass
class HMoECausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """Outputs of [`HMoEForCausalLM`].

    Attributes:
        loss: `lm_loss`, plus the scaled router losses in training.
        logits: [B, S, V].
        lm_loss: cross-entropy alone.
        aux_loss: sum of the router losses weighted by their coefficients. It and the raw losses, which follow under
            their names in `ROUTER_LOSSES`, are unscaled means over this batch, given in training while a coefficient
            is above zero and with `output_router_logits=True`.
        router_logits, router_index: as in [`HMoEModelOutputWithPast`].
    """

    router_index: tuple[Tensor, ...] | None = None
    lm_loss: Tensor | None = None

    # The raw router losses are not fields: which there are follows from the config and `ROUTER_LOSSES`.
    def __init__(self, *args, **kwargs):
        names = [field.name for field in fields(self)]
        values = {**dict(zip(names, args)), **kwargs}
        for name in names:
            setattr(self, name, values.pop(name, None))
        self.__post_init__()
        for name, raw_router_loss in values.items():
            self[name] = raw_router_loss


class HMoESparseMoeBlock(nn.Module):
    """Router and experts of one layer (HMoE Eq. 6, MoDSE Eq. 6)."""

    def __init__(self, config: HMoEConfig, layer_idx: int):
        super().__init__()
        self.gate = ROUTERS[config.router_type](config, layer_idx)
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
    """Mixtral's layer. It returns the router's outputs too: so reentrant gradient checkpointing keeps their graph."""

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
            module.init_weights(std)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        return choose_experts_implementation(requested_experts)

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        if distributed_config is not None and distributed_config.ep_size > 1:
            check_tiles_divide(model.config, distributed_config.ep_size)
            if distributed_config.ep_implementation == "auto":
                distributed_config.ep_implementation = EP_IMPLEMENTATION
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    @classmethod
    def is_remote_code(cls) -> bool:
        # FSDP2 makes a class of its own of a model's class. Its code is PyTorch's, not what loads the checkpoint.
        return not issubclass(cls, FSDPModule) and super().is_remote_code()

    def save_pretrained(self, save_directory, is_main_process: bool = True, *args, **kwargs):
        """As in Transformers; a model that FSDP2 has wrapped is saved with the code and the name of its own class."""
        if isinstance(self, FSDPModule) and self.should_save_on_this_rank(is_main_process):
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            own_class = next(cls for cls in type(self).__mro__ if not issubclass(cls, FSDPModule))
            custom_object_save(own_class, save_directory)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

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
            ValueError: a weights file or the shard index is truncated or corrupt; a tensor is missing (of a new head
                alone it may be) or has another shape than the config says; a router holds NaN or infinite weights.
                The message names file or tensor and the expectation.
        """
        folder = Path(pretrained_model_name_or_path or "", kwargs.get("subfolder") or "")
        source = "the given state_dict" if pretrained_model_name_or_path is None else folder
        try:
            # Mismatches are let through to be named below: the error of Transformers names none of them.
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kwargs,
            )
        except (SafetensorError, json.JSONDecodeError) as error:
            broken = "; ".join(_broken_files(folder)) or f"{source}: {error}"
            raise ValueError(
                f"broken weights file, truncated or not safetensors: {broken}. Download or copy it again"
            ) from error
        faults = list(_faults(model, info, ignore_mismatched_sizes))
        if faults:
            more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise ValueError(
                f"{source} does not fit its config or is damaged: {'; '.join(faults[:5])}{more}. Use the config that "
                "it was saved with, or save or download it again; ignore_mismatched_sizes=True starts tensors of "
                "another shape anew"
            )
        return (model, info) if output_loading_info else model


def _broken_files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.safetensors*")):
        try:
            if path.name == SAFE_WEIGHTS_INDEX_NAME:
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
        except (SafetensorError, json.JSONDecodeError) as error:
            yield f"{path} ({path.stat().st_size} bytes): {error}"


def _faults(model: HMoEPreTrainedModel, info: dict, ignore_mismatched_sizes: bool) -> Iterator[str]:
    """What keeps a loaded model from being the one that was saved, tensor by tensor."""
    # A new task head on a pretrained body is what fine-tuning starts from; a causal LM has no new head.
    body = "" if isinstance(model, HMoEModel | HMoEForCausalLM) else f"{model.base_model_prefix}."
    missing, unknown = (sorted(info[keys]) for keys in ("missing_keys", "unexpected_keys"))
    if missing := [name for name in missing if name.startswith(body)]:
        holds = f" and holds `{'`, `'.join(unknown[:5])}` instead" if unknown else ""
        yield f"it lacks {len(missing)} tensors, among them `{'`, `'.join(missing[:5])}`{holds}"
    for name, found, expected in sorted(info["mismatched_keys"]) if not ignore_mismatched_sizes else ():
        yield f"`{name}` has shape {tuple(found)}, the config asks for {tuple(expected)}"
    for name, parameter in model.named_parameters():
        if ".mlp.gate." in name and parameter.device.type != "meta" and not torch.isfinite(parameter).all():
            yield (
                f"router tensor `{name}` is not finite (NaN or infinite values): the run that saved it had diverged, "
                "load an earlier checkpoint"
            )


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
            router_logits=router_logits or None,
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

    def add_model_tags(self, tags: list[str] | str) -> None:
        # TRL's trainers tag the model that they will train.
        if "trl" in ([tags] if isinstance(tags, str) else tags):
            use_own_router_losses(self.model)
        super().add_model_tags(tags)

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
        global_batch = trains_router and self.config.router_loss_scope == "global_batch"
        if output_router_logits or trains_router:
            aux_loss, terms = weighted_router_losses(
                outputs.router_logits, outputs.router_index, self.config, attention_mask, global_batch=global_batch
            )
        if trains_router:
            share = router_loss_share(
                labels=labels, attention_mask=attention_mask, global_batch=global_batch, **kwargs
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
