"""HMoE configuration: its fields and their checks.

Everything here is arithmetic on a config; no tensor is made. Papers: HMoE (arXiv 2408.10681), MoDSE (arXiv
2409.12210). This file travels with every saved checkpoint, so it imports only the standard library and transformers.
"""

import copy
import math
from difflib import get_close_matches
from itertools import chain
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters


CONFIG_FORMAT_VERSION = 1

# Every head is resolvable from every checkpoint, whichever head saved it.
AUTO_MAP = {
    "AutoConfig": "configuration_hmoe.HMoEConfig",
    "AutoModel": "modeling_hmoe.HMoEModel",
    "AutoModelForCausalLM": "modeling_hmoe.HMoEForCausalLM",
    "AutoModelForSequenceClassification": "modeling_hmoe.HMoEForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_hmoe.HMoEForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_hmoe.HMoEForQuestionAnswering",
}

# Fields of homogeneous MoE and dense configs that a user may try here, with what replaces them.
_FOREIGN_FIELDS = {
    name: "give one size per expert in `expert_intermediate_sizes`, such as expert_sizes('uniform', 8, total=12288)"
    for name in ("num_experts", "num_local_experts", "intermediate_size", "moe_intermediate_size")
}
# Fields that are None or at least one.
_COUNTS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("max_position_embeddings", "sliding_window", "expert_tile_size", "num_experts_per_tok", "max_experts_per_tok"),
)


@strict
class HMoEConfig(PreTrainedConfig):
    r"""Configuration of a decoder-only language model whose MoE experts may differ in size.

    Mixtral's fields, with the experts described by a list of sizes. The defaults are HMoE-0.4B, Top-K (arXiv
    2408.10681, section 4). Every field is checked when the config is made; a bad value raises an error that names the
    field, the value and the remedy. A subclass adds the names of its own routers and routings to the `Literal`s, and
    fields for the coefficients of its own router losses (tests/test_extending.py).

    Args:
        expert_intermediate_sizes: neurons of each expert; one list for all layers, or one list per layer (lengths may
            differ). [`expert_sizes`] makes the papers' lists.
        expert_tile_size: neurons per tile of the weight bank; divides every size. Default: their greatest common
            divisor.
        routing: `"top_k"` (HMoE Eq. 8) or `"top_p"` (Eq. 9-11).
        num_experts_per_tok, norm_topk_prob: Top-K: how many experts, and whether their weights are renormalised.
        router_top_p, max_experts_per_tok: Top-P: the probability mass to reach, in (0, 1], and a cap on the experts
            per token (default: all).
        router_type: `"linear"`, or `"modse"`: linear plus RMSNorm(softplus(linear)) (MoDSE Eq. 1-5).
        load_balancing_loss_coef, load_balancing_counts: HMoE Eq. 3; counts of all activated experts (`"activated"`) or
            of the first choice (`"top1"`, MoDSE).
        parameter_penalty_loss_coef, parameter_penalty_normalizer: HMoE Eq. 4; sizes are divided by their `"mean"`,
            `"max"`, `"sum"`, or left alone (`"none"`).
        router_entropy_loss_coef: HMoE Eq. 5 with its sign corrected: the entropy is minimised.
        router_z_loss_coef: mean squared log-partition of the router (ST-MoE, arXiv 2202.08906).
        router_aux_loss_coef: factor on the weighted sum of the above.
        router_loss_scope: expert counts over the `"micro_batch"`, or the `"global_batch"`: summed over data-parallel
            ranks.
        qk_norm: RMSNorm per head on queries and keys (Qwen3).
        attention_bias: biases on the four attention projections.
    """

    model_type = "hmoe"
    default_theta = 10000.0
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "colwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    attention_dropout: float | int = 0.0
    attention_bias: bool = False
    qk_norm: bool = False
    rope_parameters: RopeParameters | dict | None = None

    expert_intermediate_sizes: list[int] | list[list[int]] | None = None
    expert_tile_size: int | None = None
    routing: Literal["top_k", "top_p"] = "top_k"
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True
    router_top_p: float | int = 0.6
    max_experts_per_tok: int | None = None
    router_type: Literal["linear", "modse"] = "linear"

    load_balancing_loss_coef: float | int = 0.0
    load_balancing_counts: Literal["activated", "top1"] = "activated"
    parameter_penalty_loss_coef: float | int = 0.1
    parameter_penalty_normalizer: Literal["mean", "max", "sum", "none"] = "mean"
    router_entropy_loss_coef: float | int = 0.0
    router_z_loss_coef: float | int = 0.0
    router_aux_loss_coef: float | int = 1.0
    router_loss_scope: Literal["micro_batch", "global_batch"] = "micro_batch"
    output_router_logits: bool = False

    format_version: int = CONFIG_FORMAT_VERSION

    def __post_init__(self, **kwargs):
        if self.format_version > CONFIG_FORMAT_VERSION:
            raise ValueError(
                f"`format_version`={self.format_version}: this config was saved by a newer hmoe; this one reads "
                f"versions up to {CONFIG_FORMAT_VERSION}. Upgrade with `pip install -U hmoe`, or load the checkpoint "
                "with its own code (trust_remote_code=True) in an environment without hmoe"
            )
        self._refuse_unknown_fields(kwargs)
        if self.expert_intermediate_sizes is None:
            self.expert_intermediate_sizes = [864, 1056, 1248, 1440, 1632, 1824, 2016, 2208]
        # The caller's list, a preset's included, stays its own.
        self.expert_intermediate_sizes = copy.deepcopy(self.expert_intermediate_sizes)
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)
        self.check()
        if self.pad_token_id is not None and not -self.vocab_size <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id`={self.pad_token_id} is outside the vocabulary of `vocab_size`={self.vocab_size}: "
                "raise `vocab_size`, or use an id below it"
            )

    def check(self) -> None:
        """Raises ValueError, with field, value and remedy, if any field cannot be; also after later assignments."""
        self._check_numbers()
        self._check_architecture()
        self._check_rope()
        self._check_sizes()
        self._check_routing()

    validate_hmoe = check  # Transformers runs every method of such a name when it saves a config

    def validate_rope(self):
        try:
            super().validate_rope()
        except KeyError as error:  # a required key is missing
            raise ValueError(f"`rope_parameters`={self.rope_parameters!r}: {error.args[0]}") from error

    @classmethod
    def _refuse_unknown_fields(cls, kwargs: dict[str, Any]) -> None:
        fields = list(cls.__dataclass_fields__)
        for name in kwargs:
            if name in _FOREIGN_FIELDS:
                raise ValueError(f"HMoEConfig has no `{name}` (got {kwargs[name]!r}): {_FOREIGN_FIELDS[name]}")
            if isinstance(vars(cls).get(name), property):
                raise ValueError(f"`{name}` (got {kwargs[name]!r}) follows from other fields of HMoEConfig: set those")
            if name.startswith("_") or hasattr(cls, name):
                continue
            if nearest := get_close_matches(name, fields, n=1, cutoff=0.8):
                raise ValueError(f"HMoEConfig has no `{name}` (got {kwargs[name]!r}): did you mean `{nearest[0]}`?")

    def _check_numbers(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value!r}")
        for name in ("rms_norm_eps", "initializer_range", "router_aux_loss_coef", *self.router_loss_coefs_by_field):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                remedy = "; 0 turns the term off" if name.endswith("_coef") else ""
                raise ValueError(f"`{name}` must be finite and not negative, got {value!r}{remedy}")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"`attention_dropout` must be in [0, 1), got {self.attention_dropout!r}")
        if not 0 < self.router_top_p <= 1:
            raise ValueError(f"`router_top_p` must be in (0, 1], got {self.router_top_p!r}; the paper uses 0.6")

    def _check_architecture(self) -> None:
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be one of {sorted(ACT2FN)}, got {self.hidden_act!r}")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads`={self.num_attention_heads} must be a multiple of "
                f"`num_key_value_heads`={self.num_key_value_heads}"
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"`hidden_size`={self.hidden_size} is not divisible by "
                    f"`num_attention_heads`={self.num_attention_heads}: give `head_dim`, or change one of them"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise ValueError(f"`head_dim`={self.head_dim} must be even: rotary embeddings turn its values in pairs")

    def _check_rope(self) -> None:
        rope, types = self.rope_parameters, ["default", *ROPE_INIT_FUNCTIONS]
        if not isinstance(rope, dict) or not {"rope_type", "rope_theta"} <= rope.keys():
            raise ValueError(f"`rope_parameters` needs `rope_type` and `rope_theta`, got {rope!r}")
        if rope["rope_type"] not in types:
            raise ValueError(f"`rope_parameters['rope_type']` must be one of {types}, got {rope['rope_type']!r}")
        for name in ("rope_theta", "factor"):
            value = rope.get(name, 1)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"`rope_parameters['{name}']` must be a positive number, got {value!r}")

    def _check_sizes(self) -> None:
        sizes = self.expert_intermediate_sizes
        if not sizes:
            raise ValueError(f"`expert_intermediate_sizes` must name at least one expert, got {sizes!r}")
        if isinstance(sizes[0], list) and len(sizes) != self.num_hidden_layers:
            raise ValueError(
                f"`expert_intermediate_sizes` has {len(sizes)} lists for `num_hidden_layers`="
                f"{self.num_hidden_layers}: give one list per layer, or one list of sizes for all layers"
            )
        largest_tile = math.gcd(*chain(*self.layer_expert_sizes))
        for layer, layer_sizes in enumerate(self.layer_expert_sizes):
            if not layer_sizes:
                raise ValueError(f"`expert_intermediate_sizes[{layer}]` must name at least one expert, got []")
            for expert, size in enumerate(layer_sizes):
                if size < 1:
                    raise ValueError(
                        f"`expert_intermediate_sizes`: expert {expert} of layer {layer} has size {size}; "
                        "every expert needs at least one neuron"
                    )
                if self.expert_tile_size is not None and size % self.expert_tile_size:
                    raise ValueError(
                        f"`expert_tile_size`={self.expert_tile_size} does not divide size {size} of expert {expert} "
                        f"in layer {layer}: use a divisor of {largest_tile}, or None for {largest_tile} itself"
                    )
        if self.expert_tile_size is None:
            self.expert_tile_size = largest_tile

    def _check_routing(self) -> None:
        fewest = min(len(sizes) for sizes in self.layer_expert_sizes)
        if self.routing == "top_k" and self.num_experts_per_tok > fewest:
            raise ValueError(
                f"`num_experts_per_tok`={self.num_experts_per_tok} is more than the {fewest} experts of a layer: "
                f"lower it to {fewest} or less, or add experts to `expert_intermediate_sizes`"
            )
        if self.max_experts_per_tok is not None and self.max_experts_per_tok > fewest:
            raise ValueError(
                f"`max_experts_per_tok`={self.max_experts_per_tok} is more than the {fewest} experts of a layer: "
                "lower it, or leave it None for no cap"
            )
        if self.router_type == "modse" and not (self.routing == "top_k" and self.norm_topk_prob):
            raise ValueError(
                f"`router_type`='modse' is defined for `routing`='top_k' with `norm_topk_prob`=True (MoDSE Eq. 1), "
                f"got `routing`={self.routing!r}, `norm_topk_prob`={self.norm_topk_prob}: change these, or use "
                "'linear'"
            )

    @property
    def layer_expert_sizes(self) -> list[list[int]]:
        """Sizes of the experts of every layer, whichever form `expert_intermediate_sizes` has."""
        sizes = self.expert_intermediate_sizes
        return list(sizes) if isinstance(sizes[0], list) else [list(sizes)] * self.num_hidden_layers

    @property
    def num_experts(self) -> int:
        """Experts per layer; the largest number where layers differ."""
        return max(len(sizes) for sizes in self.layer_expert_sizes)

    num_local_experts = num_experts

    @property
    def router_loss_coefs_by_field(self) -> dict[str, float]:
        """Coefficients of the router losses, by their fields: all that end in `_loss_coef` but the common factor."""
        names = [name for name in self.__dataclass_fields__ if name.endswith("_loss_coef")]
        return {name: getattr(self, name) for name in names if name != "router_aux_loss_coef"}

    @property
    def has_router_losses(self) -> bool:
        """Whether training adds any router term to the loss."""
        return self.router_aux_loss_coef > 0 and any(coef > 0 for coef in self.router_loss_coefs_by_field.values())

    @property
    def keys_to_ignore_at_inference(self) -> list[str]:
        """Outputs of the model that `Trainer` does not gather in evaluation."""
        losses = [field.removesuffix("_coef") for field in self.router_loss_coefs_by_field]
        return ["past_key_values", "lm_loss", "aux_loss", *losses, "router_logits", "router_index"]

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "HMoEConfig":
        """The configuration of a model of the papers or of its homogeneous twin; `overrides` replace single fields.

        `hmoe.PRESETS` lists the names.

        Raises:
            ValueError: for an unknown name, with the nearest one.
            ImportError: where the package is not installed; this file also travels with checkpoints, presets do not.
        """
        try:
            from hmoe.presets import preset_fields
        except ImportError as error:
            raise ImportError(f"preset {name!r}: presets come with the package: `pip install hmoe`") from error
        return cls(**{**preset_fields(name), **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        if not config_dict:
            # Transformers gives an empty dict for a folder that has no config.json.
            raise ValueError("no config.json found, or it is empty: a checkpoint needs the one it was saved with")
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"this checkpoint's config has `model_type`={model_type!r}, not {cls.model_type!r}: load it with "
                "AutoModelForCausalLM, or convert it to hmoe first"
            )
        # Overrides join before construction, so that they are checked together with the rest.
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in cls.__dataclass_fields__}
        cls._refuse_unknown_fields(kwargs)
        if overrides.get("dtype") == "auto":
            del overrides["dtype"]
        return super().from_dict({**config_dict, **overrides}, **kwargs)


def is_hmoe(config: Any) -> bool:
    """Whether a config is of an HMoE model. The class that a checkpoint's own code defines is not [`HMoEConfig`]."""
    return config.model_type == HMoEConfig.model_type
