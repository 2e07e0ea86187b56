"""The families of models that convert. A record says how to read a family's config as `HMoEConfig`, and what its
tensors are called.

Another family is one more entry of `DENSE_FAMILIES` or `MOE_FAMILIES`; tests/conversion/test_moe.py adds one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig


# Config fields of the same name and meaning in HMoE and all families.
SHARED_FIELDS = (
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


def _refuse_mlp_bias(config: PreTrainedConfig) -> None:
    if config.mlp_bias:
        raise CannotConvert("mlp_bias", True, "experts have no biases", "Only models without FFN biases convert")


def _refuse_olmoe_attention(config: PreTrainedConfig) -> None:
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


def _qwen3_moe_dense_layers(config: PreTrainedConfig) -> list[int]:
    layers = range(config.num_hidden_layers)
    return [i for i in layers if i in config.mlp_only_layers or (i + 1) % config.decoder_sparse_step]


@dataclass(frozen=True)
class Family:
    """A family's attention.

    Attributes:
        attention_bias: whether the projections have biases; None: if the config's `attention_bias` says so.
        without_bias: projections that have none even then. HMoE gets zeros there.
        qk_norm: whether queries and keys are normalised, head by head.
        sliding_window: whether the config's `sliding_window` is used.
        refuse: raises CannotConvert if the config has another setting that HMoE lacks.
    """

    attention_bias: bool | None = None
    without_bias: tuple[str, ...] = ()
    qk_norm: bool = False
    sliding_window: bool = False
    refuse: Callable[[PreTrainedConfig], None] = lambda config: None


@dataclass(frozen=True)
class MoEFamily(Family):
    """A family of mixtures of experts.

    Attributes:
        width: config field with the number of neurons of an expert.
        block: module that holds router and experts on disk.
        parts: an expert's `gate`, `up` and `down` projections on disk.
        dense_layers: from a config, the layers that have an FFN in the place of experts.
    """

    width: str = "intermediate_size"
    block: str = "mlp"
    parts: Mapping[str, str] = field(
        default_factory=lambda: {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    )
    dense_layers: Callable[[PreTrainedConfig], list[int]] = lambda config: []


DENSE_FAMILIES = {
    "llama": Family(refuse=_refuse_mlp_bias),
    "mistral": Family(attention_bias=False, sliding_window=True),
    "qwen2": Family(attention_bias=True, without_bias=("o_proj",), sliding_window=True),
    "qwen3": Family(qk_norm=True, sliding_window=True),
}
MOE_FAMILIES = {
    "mixtral": MoEFamily(
        attention_bias=False,
        sliding_window=True,
        block="block_sparse_moe",
        parts={"gate": "w1", "up": "w3", "down": "w2"},
    ),
    "qwen3_moe": MoEFamily(
        qk_norm=True, sliding_window=True, width="moe_intermediate_size", dense_layers=_qwen3_moe_dense_layers
    ),
    "olmoe": MoEFamily(qk_norm=True, refuse=_refuse_olmoe_attention),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The record of a config's family; HMoE's own is that of a family without peculiarities."""
    return {**DENSE_FAMILIES, **MOE_FAMILIES, "hmoe": Family()}[config.model_type]


def load_source_config(folder: Path, expected: Collection[str], command: str) -> PreTrainedConfig:
    """The config of a source checkpoint, if its type is one of `expected` and its weights are plain tensors."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: give the folder of a checkpoint")
    try:
        fields, _ = PreTrainedConfig.get_config_dict(folder)
    except OSError as error:
        raise ValueError(f"{error} Download or copy it again") from error
    model_type = fields.get("model_type")
    if model_type not in expected:
        reason = f"`hmoe convert {command}` reads {', '.join(expected)}"
        raise CannotConvert("model_type", model_type, reason, _other_command(model_type))
    if quantization := fields.get("quantization_config"):
        reason = "quantized weights cannot be regrouped exactly"
        raise CannotConvert(
            "quantization_config", quantization.get("quant_method"), reason, "Dequantize the model first"
        )
    return AutoConfig.from_pretrained(folder)


def _other_command(model_type: str | None) -> str:
    for command, types in (("dense", DENSE_FAMILIES), ("moe", MOE_FAMILIES), ("resize` or `export", ("hmoe",))):
        if model_type in types:
            return f"Use `hmoe convert {command}` for it"
    return "Convert it to one of these with the tools of its authors first"


def shared_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Everything of the HMoE config that is not about experts.

    Raises:
        CannotConvert: a setting of the attention that HMoE does not have.
    """
    family = family_of(config)
    family.refuse(config)
    return {
        **{name: getattr(config, name) for name in SHARED_FIELDS},
        "attention_dropout": config.attention_dropout or 0.0,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "attention_bias": config.attention_bias if family.attention_bias is None else family.attention_bias,
        "qk_norm": family.qk_norm,
        "sliding_window": _uniform_window(config) if family.sliding_window else None,
    }


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
