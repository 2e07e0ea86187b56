"""The families of models that are converted: what their configs say in the terms of `HMoEConfig`, or why it cannot be
said, and what their tensors are called."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..configuration_hmoe import HMoEConfig


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
)


class CannotConvert(ValueError):
    """A config field's value has no counterpart in the target."""

    def __init__(self, field: str, value: Any, reason: str, remedy: str):
        super().__init__(f"cannot convert `{field}`={value!r}: {reason}. {remedy}")
        self.field, self.value = field, value


@dataclass(frozen=True)
class Attention:
    """How a family's attention is expressed.

    Attributes:
        fields: `attention_bias`, `qk_norm`, `sliding_window` and `head_dim` of the HMoE config.
        projections: of q, k, v, o, those that have a bias in the source.
    """

    fields: dict[str, Any]
    projections_with_bias: tuple[str, ...]


def _attention(bias: bool, *, qk_norm: bool = False, sliding_window: int | None = None) -> Attention:
    fields = {"attention_bias": bias, "qk_norm": qk_norm, "sliding_window": sliding_window}
    return Attention(fields, PROJECTIONS if bias else ())


def _uniform_window(config: PreTrainedConfig) -> int | None:
    """The sliding window of all layers, or None; HMoE cannot have it on some layers only."""
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if config.sliding_window is None or kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        raise CannotConvert(
            "layer_types",
            sorted(kinds),
            f"HMoE has the window `sliding_window`={config.sliding_window} on every layer or on none",
            "Set `use_sliding_window` to false in config.json if all contexts are shorter than the window",
        )
    return config.sliding_window


def _llama(config: PreTrainedConfig) -> Attention:
    if config.mlp_bias:
        raise CannotConvert("mlp_bias", True, "experts have no biases", "Only models without FFN biases convert")
    return _attention(config.attention_bias)


def _mistral(config: PreTrainedConfig) -> Attention:
    return _attention(False, sliding_window=_uniform_window(config))


def _qwen2(config: PreTrainedConfig) -> Attention:
    # Qwen2 has no bias on the output projection; a zero one says the same.
    fields = {"attention_bias": True, "qk_norm": False, "sliding_window": _uniform_window(config)}
    return Attention(fields, ("q_proj", "k_proj", "v_proj"))


def _qwen3(config: PreTrainedConfig) -> Attention:
    return _attention(config.attention_bias, qk_norm=True, sliding_window=_uniform_window(config))


def _mixtral(config: PreTrainedConfig) -> Attention:
    return _attention(False, sliding_window=config.sliding_window)


def _qwen3_moe(config: PreTrainedConfig) -> Attention:
    return _attention(config.attention_bias, qk_norm=True, sliding_window=config.sliding_window)


def _olmoe(config: PreTrainedConfig) -> Attention:
    if config.clip_qkv is not None:
        raise CannotConvert(
            "clip_qkv", config.clip_qkv, "HMoE does not clip queries, keys and values", "There is no exact conversion"
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, name) != 1:
            raise CannotConvert(
                name,
                getattr(config, name),
                "OLMoE normalises queries and keys over all heads together, HMoE head by head; they agree with one "
                "head only",
                "There is no exact conversion of this attention",
            )
    return _attention(config.attention_bias, qk_norm=True)


def _no_layers(config: PreTrainedConfig) -> list[int]:
    return []


def _qwen3_moe_dense_layers(config: PreTrainedConfig) -> list[int]:
    layers = range(config.num_hidden_layers)
    return [i for i in layers if i in config.mlp_only_layers or (i + 1) % config.decoder_sparse_step]


@dataclass(frozen=True)
class MoEFamily:
    """A family of mixtures: all that its conversion into HMoE needs, and the spelling that an export writes.

    Attributes:
        attention: its attention in the terms of `HMoEConfig`.
        width: config field of the neurons of an expert.
        block: module that holds router and experts on disk.
        parts: an expert's `gate`, `up` and `down` projections on disk.
        dense_layers: layers that have an FFN in the place of experts.
    """

    attention: Callable[[PreTrainedConfig], Attention]
    width: str = "intermediate_size"
    block: str = "mlp"
    parts: Mapping[str, str] = field(
        default_factory=lambda: {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    )
    dense_layers: Callable[[PreTrainedConfig], list[int]] = _no_layers


MOE_FAMILIES = {
    "mixtral": MoEFamily(_mixtral, block="block_sparse_moe", parts={"gate": "w1", "up": "w3", "down": "w2"}),
    "qwen3_moe": MoEFamily(_qwen3_moe, width="moe_intermediate_size", dense_layers=_qwen3_moe_dense_layers),
    "olmoe": MoEFamily(_olmoe),
}
DENSE_FAMILIES = {"llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3}


def load_source_config(folder: Path, expected: Collection[str], command: str) -> PreTrainedConfig:
    """The config of a source checkpoint, if its type is one of `expected` and its weights are plain tensors."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json: give the folder of a checkpoint")
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}. Download or copy it again") from error
    model_type = raw.get("model_type")
    if model_type not in expected:
        raise CannotConvert(
            "model_type",
            model_type,
            f"`hmoe convert {command}` reads {', '.join(expected)}",
            _other_command(model_type),
        )
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method")
        raise CannotConvert(
            "quantization_config",
            method,
            "quantized weights cannot be regrouped exactly",
            "Dequantize the model first",
        )
    return AutoConfig.from_pretrained(folder)


def _other_command(model_type: str | None) -> str:
    for command, types in (("dense", DENSE_FAMILIES), ("moe", MOE_FAMILIES), ("resize` or `export", ("hmoe",))):
        if model_type in types:
            return f"Use `hmoe convert {command}` for it"
    return "Convert it to one of these with the tools of its authors first"


def shared_fields(config: PreTrainedConfig) -> tuple[dict[str, Any], Attention]:
    """Everything of the HMoE config that is not about experts.

    Raises:
        CannotConvert: a setting of the attention that HMoE does not have.
    """
    family = DENSE_FAMILIES.get(config.model_type) or MOE_FAMILIES[config.model_type].attention
    attention = family(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields = {name: getattr(config, name) for name in _SAME_FIELDS}
    fields["attention_dropout"] = config.attention_dropout or 0.0
    return {**fields, "head_dim": head_dim, **attention.fields}, attention


def attention_names(config: HMoEConfig, layer: int) -> list[str]:
    """Tensors of a layer's attention and norms, which every family stores under the same names."""
    prefix = f"model.layers.{layer}"
    names = [f"{prefix}.self_attn.{projection}.weight" for projection in PROJECTIONS]
    if config.attention_bias:
        names += [f"{prefix}.self_attn.{projection}.bias" for projection in PROJECTIONS]
    if config.qk_norm:
        names += [f"{prefix}.self_attn.q_norm.weight", f"{prefix}.self_attn.k_norm.weight"]
    return [*names, f"{prefix}.input_layernorm.weight", f"{prefix}.post_attention_layernorm.weight"]


def model_names(config: HMoEConfig) -> list[str]:
    """Tensors outside the layers; the head is left out where it is the embedding."""
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    return names if config.tie_word_embeddings else [*names, "lm_head.weight"]
