"""The model of a run: fresh from a preset or config, or a checkpoint, with or without LoRA adapters."""

from __future__ import annotations

import os
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from hmoe.configuration_hmoe import HMoEConfig, is_hmoe
from hmoe.errors import did_you_mean
from hmoe.sources import load_checkpoint

from .arguments import LoraOptions, ModelOptions


logger = logging.get_logger(__name__)


def build_config(options: ModelOptions, tokenizer: PreTrainedTokenizerBase | None = None) -> Any:
    """The config of the model.

    A fresh one takes its special tokens from the tokenizer and, if neither preset nor `model_config` name it, its
    vocabulary size.

    Raises:
        ValueError: for an unknown preset, model type or field, or a vocabulary smaller than the tokenizer's.
    """
    fields = dict(options.model_config or {})  # type: ignore[arg-type]
    if options.model_name_or_path is not None:
        name, trust = options.model_name_or_path, options.trust_remote_code
        config = load_checkpoint(AutoConfig.from_pretrained, name, "config", trust_remote_code=trust, **fields)
    else:
        if tokenizer is not None:
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                fields.setdefault(name, getattr(tokenizer, name))
        if options.preset is not None:
            _check_fields(HMoEConfig, fields, options.preset)
            config = HMoEConfig.from_preset(options.preset, **fields)
        else:
            if tokenizer is not None:
                fields.setdefault("vocab_size", len(tokenizer))
            config = _typed_config(str(options.model_type), fields)
    if tokenizer is not None and config.get_text_config().vocab_size < len(tokenizer):
        raise ValueError(
            f"`vocab_size`={config.get_text_config().vocab_size} of the model is less than the {len(tokenizer)} "
            f"tokens of the tokenizer: set `model_config.vocab_size` to {len(tokenizer)} or more, or take a smaller "
            "tokenizer"
        )
    return config


def _typed_config(model_type: str, fields: dict[str, Any]) -> Any:
    if model_type not in CONFIG_MAPPING:
        hint = did_you_mean(model_type, CONFIG_MAPPING.keys())
        raise ValueError(f"`model_type`={model_type!r} is unknown to Transformers{hint}")
    _check_fields(CONFIG_MAPPING[model_type], fields, model_type)
    return AutoConfig.for_model(model_type, **fields)


def _check_fields(config_class: Any, fields: dict[str, Any], of: str) -> None:
    """Configs take any keyword, so that a misspelt one would silently do nothing."""
    if config_class is HMoEConfig and "num_experts" in fields:
        return  # the config says what replaces it
    known = {*config_class.__dataclass_fields__, *config_class.attribute_map}
    for name in fields:
        if name not in known and not hasattr(config_class, name):
            raise ValueError(f"`model_config`: {of} has no field `{name}`{did_you_mean(name, known)}")


def build_model(options: ModelOptions, config: Any) -> Any:
    """The causal language model, with the weights of the checkpoint if there is one."""
    settings: dict[str, Any] = {"trust_remote_code": options.trust_remote_code, "dtype": options.dtype or "float32"}
    for name in ("attn_implementation", "experts_implementation"):
        if getattr(options, name) is not None:
            settings[name] = getattr(options, name)
    distributed = {"distributed_config": build_distributed_config(options.distributed)} if options.distributed else {}
    if options.model_name_or_path is not None:
        name, sharded = options.model_name_or_path, {**settings, **distributed}
        return load_checkpoint(AutoModelForCausalLM.from_pretrained, name, config=config, **sharded)
    if settings["dtype"] == "auto":
        del settings["dtype"]
    model = AutoModelForCausalLM.from_config(config, **settings)
    if distributed:
        # Transformers shards only what it loads; every rank draws the weights of the seed and keeps its part of them.
        weights, generation = model.state_dict(), model.generation_config
        model = type(model).from_pretrained(None, config=config, state_dict=weights, **settings, **distributed)
        model.generation_config = generation
    return model


def build_distributed_config(fields: Any) -> DistributedConfig:
    """The `DistributedConfig` of Transformers.

    Raises:
        ValueError: for a field that it does not have, and if its sizes do not make the number of processes.
    """
    known = list(DistributedConfig.__dataclass_fields__)
    for name in fields:
        if name not in known:
            raise ValueError(f"`distributed` has no field `{name}`{did_you_mean(name, known)}")
    config = DistributedConfig(**fields)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if config.tp_size * config.dp_size * config.pp_size != processes:
        raise ValueError(
            f"`distributed`={dict(fields)}: fsdp_size x tp_size x dp_replicate_size x pp_size is "
            f"{config.tp_size * config.dp_size * config.pp_size}, but {processes} processes run: start as many, or "
            "change the sizes"
        )
    return config


def add_lora(model: Any, options: LoraOptions) -> Any:
    """The model frozen, with LoRA adapters to train.

    Raises:
        ValueError: if PEFT is missing, or the options name nothing to adapt.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError("`lora` needs PEFT: pip install 'hmoe[peft]'") from None

    scales: dict[str, Any] = {
        "r": options.lora_r,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
    }
    if not is_hmoe(model.config):
        return get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **scales))

    from hmoe.lora import lora_config

    experts, router = options.lora_experts, options.lora_router
    config = lora_config(attention=options.lora_attention, experts=experts, router=router, **scales)
    return get_peft_model(model, config)
