"""Random checkpoints of every source family, small enough to convert in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from hmoe.conversion.base import Options


SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
QUIET = Options(progress=False)
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "intermediate_size": 40}
CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"intermediate_size": 96}),
    "llama-bias": (LlamaConfig, {"intermediate_size": 96, "attention_bias": True, "head_dim": 16}),
    "llama-rope": (
        LlamaConfig,
        {
            "intermediate_size": 96,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": (MistralConfig, {"intermediate_size": 96, "sliding_window": 16}),
    "qwen2": (Qwen2Config, {"intermediate_size": 96}),
    "qwen2-window": (
        Qwen2Config,
        {"intermediate_size": 96, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
    ),
    "qwen3": (Qwen3Config, {"intermediate_size": 96, "head_dim": 16}),
    "mixtral": (MixtralConfig, {"intermediate_size": 48, "num_local_experts": 4, "router_aux_loss_coef": 0.02}),
    "mixtral-window": (MixtralConfig, {"intermediate_size": 48, "num_local_experts": 4, "sliding_window": 16}),
    "qwen3_moe": (Qwen3MoeConfig, {**_EXPERTS, "head_dim": 16, "norm_topk_prob": False}),
    "qwen3_moe-norm": (Qwen3MoeConfig, {**_EXPERTS, "head_dim": 16, "norm_topk_prob": True, "attention_bias": True}),
    "qwen3_moe-dense": (
        Qwen3MoeConfig,
        {**_EXPERTS, "head_dim": 16, "num_experts_per_tok": 4, "mlp_only_layers": [1], "norm_topk_prob": True},
    ),
    "qwen3_moe-step": (Qwen3MoeConfig, {**_EXPERTS, "head_dim": 16, "decoder_sparse_step": 2}),
    "olmoe": (
        OlmoeConfig,
        {
            **{"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 24},
            **{"num_attention_heads": 1, "num_key_value_heads": 1, "pad_token_id": 1, "eos_token_id": 2},
        },
    ),
}
DENSE = [name for name in CONFIGS if name.split("-")[0] in ("llama", "mistral", "qwen2", "qwen3")]
MOE = [name for name in CONFIGS if name not in DENSE]


def make_checkpoint(folder: Path, name: str, *, spelling: str = "hub", **overrides) -> Path:
    """A random model of `CONFIGS[name]` saved in `folder`.

    Args:
        spelling: of experts on disk: `"hub"` (one tensor per expert) or `"fused"` (as in memory).
        overrides: config fields, and `max_shard_size`, `dtype`.
    """
    config_class, fields = CONFIGS[name]
    shard_size = overrides.pop("max_shard_size", "5GB")
    dtype = overrides.pop("dtype", torch.float32)
    config = config_class(**{**SHAPE, **fields, **overrides})
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Norms and biases away from their neutral start, so that a forgotten one shows.
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            if parameter_name.endswith(".mlp.gate.weight"):
                parameter.normal_()
    model.save_pretrained(folder, max_shard_size=shard_size, save_original_format=spelling == "hub")
    return folder


def add_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a chat template, saved beside the weights."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    return fast


def make_text(path: Path, num_characters: int = 3000) -> Path:
    words = ["expert", "router", "token", "neuron", "layer", "width", "gate", "tile"]
    picks = torch.randint(len(words), (num_characters // 5,)).tolist()
    path.write_text(" ".join(words[i] for i in picks)[:num_characters])
    return path


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits_of(folder_or_model: Any, length: int = 40) -> Tensor:
    """Logits [2, S, V] for fixed random tokens, longer than the sliding windows."""
    model = load(folder_or_model) if isinstance(folder_or_model, Path) else folder_or_model
    tokens = torch.randint(256, (2, length), generator=torch.Generator().manual_seed(1))
    return model(input_ids=tokens).logits
