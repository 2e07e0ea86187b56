"""Configurations of the models of both papers and of their homogeneous and dense twins.

HMoE: arXiv 2408.10681, section 4; MoDSE: arXiv 2409.12210, Tables 1-2.
"""

from difflib import get_close_matches
from typing import Any

from .sizes import expert_sizes


_HMOE_0_4B = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 4096,
    "expert_intermediate_sizes": expert_sizes("arithmetic", 8, total=12288),
    "parameter_penalty_loss_coef": 0.1,
}
# The paper prints 12 blocks, which make 1.32 B parameters; 24 blocks give its 2.55 B and its activated counts.
_HMOE_3B = {
    **_HMOE_0_4B,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "expert_intermediate_sizes": expert_sizes("arithmetic", 8, total=32768),
}
_HOMOGENEOUS = {"parameter_penalty_loss_coef": 0.0, "load_balancing_loss_coef": 0.01}
_TOP_P = {"routing": "top_p", "router_top_p": 0.6, "router_entropy_loss_coef": 0.03}
# The paper gives neither the coefficient nor the context length: Switch's 1e-2 and 2048 are chosen here.
_MODSE = {
    "vocab_size": 30064,
    "max_position_embeddings": 2048,
    "router_type": "modse",
    "load_balancing_loss_coef": 0.01,
    "load_balancing_counts": "top1",
    "parameter_penalty_loss_coef": 0.0,
}
_MODSE_300M = {**_MODSE, "hidden_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 12}
_MODSE_700M = {**_MODSE, "hidden_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 32}
_UNIFORM_0_4B = {"expert_intermediate_sizes": [1536] * 8, **_HOMOGENEOUS}
_UNIFORM_3B = {"expert_intermediate_sizes": [4096] * 8, **_HOMOGENEOUS}
_ONE_EXPERT = {"num_experts_per_tok": 1, "parameter_penalty_loss_coef": 0.0}

PRESETS: dict[str, dict[str, Any]] = {
    "hmoe-0.4b": _HMOE_0_4B,
    "hmoe-0.4b-top-p": {**_HMOE_0_4B, **_TOP_P},
    "hmoe-0.4b-hybrid": {**_HMOE_0_4B, "expert_intermediate_sizes": expert_sizes("hybrid", 8, total=12288)},
    # 12288 / 255 is no whole number and the paper does not say how it rounds: multiples of 16, the sum kept.
    "hmoe-0.4b-geometric": {
        **_HMOE_0_4B,
        "expert_intermediate_sizes": expert_sizes("geometric", 8, total=12288, multiple_of=16),
    },
    "moe-0.4b": {**_HMOE_0_4B, **_UNIFORM_0_4B},
    "moe-0.4b-top-p": {**_HMOE_0_4B, **_UNIFORM_0_4B, **_TOP_P},
    "dense-0.4b": {**_HMOE_0_4B, **_ONE_EXPERT, "expert_intermediate_sizes": [12288]},
    "hmoe-3b": _HMOE_3B,
    "hmoe-3b-top-p": {**_HMOE_3B, **_TOP_P},
    "hmoe-3b-hybrid": {**_HMOE_3B, "expert_intermediate_sizes": expert_sizes("hybrid", 8, total=32768)},
    "moe-3b": {**_HMOE_3B, **_UNIFORM_3B},
    "moe-3b-top-p": {**_HMOE_3B, **_UNIFORM_3B, **_TOP_P},
    # The dense 1B has the printed 12 blocks: its 1.32 B parameters fit them.
    "dense-1b": {**_HMOE_3B, **_ONE_EXPERT, "num_hidden_layers": 12, "expert_intermediate_sizes": [32768]},
    "modse-300m-x8": {**_MODSE_300M, "expert_intermediate_sizes": expert_sizes("pairs", 8, total=8 * 3840)},
    "moe-300m-x8": {**_MODSE_300M, "router_type": "linear", "expert_intermediate_sizes": [3840] * 8},
    # MoDSE's "Baseline 105%": as wide as the mean expert that its text says MoDSE activates.
    "moe-300m-x8-105": {**_MODSE_300M, "router_type": "linear", "expert_intermediate_sizes": [4045] * 8},
    "modse-700m-x8": {**_MODSE_700M, "expert_intermediate_sizes": expert_sizes("pairs", 8, total=8 * 5120)},
    "moe-700m-x8": {**_MODSE_700M, "router_type": "linear", "expert_intermediate_sizes": [5120] * 8},
}


def preset_fields(name: str) -> dict[str, Any]:
    """Fields of the config of a preset; ValueError with the nearest name for one that does not exist."""
    if name not in PRESETS:
        nearest = get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown preset {name!r}, did you mean {nearest!r}? Presets: {', '.join(PRESETS)}")
    return PRESETS[name]
