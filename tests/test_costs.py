"""Parameters against the papers' figures and real models, and FLOPs against a literal count."""

import itertools
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from hmoe import HMoEConfig, HMoEForCausalLM, count_parameters, lora_config
from hmoe.costs import CONVENTIONS, inverse_size_load, model_costs
from hmoe.training.router_log import RouterMetrics, RouterWindow


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
LENGTH = 16


def hmoe(**overrides) -> HMoEForCausalLM:
    torch.manual_seed(0)
    fields = {
        **SMALL,
        "expert_intermediate_sizes": [[8, 16, 24, 40], [16, 8, 8]],
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return HMoEForCausalLM(HMoEConfig(**{**fields, **overrides}))


@pytest.mark.parametrize(
    ("preset", "attribute", "figure", "unit"),
    [
        pytest.param("dense-0.4b", "total", 417.2e6, 0.1e6, id="hmoe-paper-dense-0.4b"),
        pytest.param("dense-1b", "total", 1.3238e9, 0.0001e9, id="hmoe-paper-dense-1b"),
        pytest.param("moe-0.4b", "activated", 162.5e6, 0.1e6, id="hmoe-paper-moe-0.4b-activated"),
        pytest.param("hmoe-3b", "total", 2.582e9, 0.001e9, id="hmoe-paper-3b"),
        pytest.param("moe-3b", "activated", 0.7704e9, 0.0001e9, id="hmoe-paper-moe-3b-activated"),
        pytest.param("modse-300m-x8", "total", 1.300e9, 0.001e9, id="modse-paper-300m-x8"),
        pytest.param("modse-300m-x8", "activated", 451e6, 1e6, id="modse-paper-300m-x8-activated"),
        pytest.param("modse-700m-x8", "total", 3.344e9, 0.001e9, id="modse-paper-700m-x8"),
        pytest.param("modse-700m-x8", "activated", 1.079e9, 0.001e9, id="modse-paper-700m-x8-activated"),
    ],
)
def test_preset_has_the_papers_parameter_count(preset, attribute, figure, unit):
    """HMoE section 4 and MoDSE Table 1, to one unit of the last digit (some figures leave out router and norms)."""
    counts = count_parameters(HMoEConfig.from_preset(preset))
    assert getattr(counts, attribute) == pytest.approx(figure, abs=unit, rel=0)


def test_counted_parameters_are_the_real_ones_part_by_part(any_config):
    parts = {
        "embedding": r"embed_tokens|lm_head",
        "attention": r"self_attn\.[qkvo]_proj",
        "router": r"mlp\.gate|act_fn",
        "norms": r"norm",
        "experts": r"mlp\.experts",
    }
    real = dict.fromkeys(parts, 0)
    with torch.device("meta"):
        model = HMoEForCausalLM(any_config)
    for name, parameter in model.named_parameters():
        real[next(part for part, pattern in parts.items() if re.search(pattern, name))] += parameter.numel()
    counts = count_parameters(any_config)
    counted = {part: getattr(counts, part) for part in parts} | {"experts": sum(map(sum, counts.experts))}
    assert counted == real
    assert counts.total == sum(real.values())


def test_activated_parameters_follow_the_measured_load(any_config):
    sizes = any_config.layer_expert_sizes
    load = [torch.rand(len(layer)).tolist() for layer in sizes]
    counts = count_parameters(any_config, load)
    neurons = sum(share * size for row, layer in zip(load, sizes) for share, size in zip(row, layer))
    unconditional = counts.embedding + counts.attention + counts.norms + counts.router
    # A neuron of a gated expert has three weights per hidden unit: gate, up, down (HMoE Eq. 1-2).
    assert counts.activated == pytest.approx(unconditional + 3 * any_config.hidden_size * neurons)
    assert counts.activated_ratio == pytest.approx(neurons / sum(map(sum, sizes)))


def test_activated_ratio_at_the_penaltys_equilibrium_is_the_derived_one():
    """Load inverse to size on the ladder 9..23, k = 2: 16 / (128 sum_r 1/r) = 22.8 % (HMoE-0.4B Top-K has 22.2 %)."""
    config = HMoEConfig.from_preset("hmoe-0.4b")
    inverse = [1 / size for size in config.expert_intermediate_sizes]
    load = [2 * value / sum(inverse) for value in inverse]
    ratio = count_parameters(config, [load] * config.num_hidden_layers).activated_ratio
    assert ratio == pytest.approx(16 / (128 * sum(1 / r for r in range(9, 24, 2))))
    assert ratio == pytest.approx(0.228, abs=0.0005)


@pytest.mark.parametrize(
    ("overrides", "numbers"),
    [
        pytest.param({"num_experts_per_tok": 2}, [2], id="top-k"),
        pytest.param({"routing": "top_p"}, [1, 2, 3, 4], id="top-p"),
        pytest.param({"routing": "top_p", "max_experts_per_tok": 2}, [1, 2], id="top-p-capped"),
    ],
)
def test_activated_bounds_are_those_over_all_sets_of_experts(tiny_config, overrides, numbers):
    config = tiny_config(expert_intermediate_sizes=[[24, 8, 32, 16], [40, 8, 8, 16]], **overrides)
    counts = count_parameters(config)
    unconditional = counts.total - sum(map(sum, counts.experts))
    sums = [[sum(s) for n in numbers for s in itertools.combinations(layer, n)] for layer in counts.experts]
    assert counts.activated_min == unconditional + sum(map(min, sums))
    assert counts.activated_max == unconditional + sum(map(max, sums))


@pytest.mark.parametrize("load", [[[0.5] * 4], [[0.5] * 4, [0.5] * 3]], ids=["layer-missing", "expert-missing"])
def test_load_of_another_shape_is_refused(tiny_config, load):
    with pytest.raises(ValueError, match=r"`load` has \[4.*the config has \[4, 4\]"):
        count_parameters(tiny_config(), load)


def literal_flops(model, ids) -> int:
    """Every product of a forward pass, but for the tables of rotary positions."""
    model.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False, depth=None)
    with counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    counts = counter.get_flop_counts()
    rotary = sum(sum(ops.values()) for name, ops in counts.items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - rotary


# Of the types that convert, and of others: all that `hmoe describe` knows.
STOCK = {
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "mlp_only_layers": [0],
    },
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 56,
    },
    "flex_olmo": {"num_experts": 5, "num_experts_per_tok": 2},
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    },
    "llama": {"tie_word_embeddings": True, "mlp_bias": True, "attention_bias": True},
    "mistral": {"sliding_window": 32},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 12},
    "granite": {},
    "olmo": {},
    "olmo2": {},
    "cohere": {},
    "stablelm": {},
    "smollm3": {},
    "seed_oss": {"head_dim": 8},
    "bitnet": {},
}


def stock_config(model_type: str):
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    return CONFIG_MAPPING[model_type](**{**SMALL, **special, "intermediate_size": 48, **STOCK[model_type]})


@pytest.mark.parametrize("model_type", STOCK)
def test_stock_models_have_the_counted_parameters_and_the_literal_flops(model_type):
    config = stock_config(model_type)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    costs = model_costs(config)
    assert costs.not_counted is None
    named = dict(model.named_parameters())
    assert costs.parameters == sum(parameter.numel() for parameter in named.values())
    experts = sum(parameter.numel() for name, parameter in named.items() if ".experts." in name)
    assert sum(map(sum, costs.expert_parameters)) == experts
    assert sum(costs.parts.values()) == costs.parameters - experts
    ids = torch.randint(0, 64, (3, LENGTH))
    assert costs.forward_flops().count(ids.numel(), LENGTH) == literal_flops(model, ids)
    assert model_costs(model) == costs


@pytest.mark.parametrize(
    ("model_type", "overrides", "reason"),
    [
        ("gpt2", {}, r"`transformer\.wte\.weight` \[64, 32\] is not known"),
        ("deepseek_v2", {"num_experts_per_tok": 2}, "q_a_proj"),
        ("diffllama", {}, "lambda_q1"),
        ("phi3", {"pad_token_id": 0}, "qkv_proj"),
        ("qwen3_next", {}, "linear_attention is not known"),
        ("gpt_oss", {}, "`sliding_window`=128 on some layers only"),
        ("granitemoe", {}, "block_sparse_moe"),
        ("mamba", {}, "linear_attention is not known"),
    ],
)
def test_models_that_cost_something_else_say_which_part_is_not_counted(model_type, overrides, reason):
    config = CONFIG_MAPPING[model_type](**{**SMALL, **overrides})
    assert re.search(reason, model_costs(config).not_counted)


def test_a_config_of_no_causal_language_model_is_refused():
    with pytest.raises(ValueError, match="'t5' are no causal language models"):
        model_costs(AutoConfig.for_model("t5"))


def test_equal_configs_are_counted_once_and_changed_ones_again():
    config = HMoEConfig.from_preset("hmoe-0.4b")
    assert model_costs(config) is model_costs(HMoEConfig.from_preset("hmoe-0.4b"))
    config.num_hidden_layers = 3
    assert count_parameters(config).total < count_parameters(HMoEConfig.from_preset("hmoe-0.4b")).total


@pytest.mark.parametrize("parts", [{"experts": False}, {"router": True, "modules_to_save": ["lm_head"]}])
def test_adapters_are_parameters_but_no_flops(parts):
    peft = pytest.importorskip("peft")
    plain = model_costs(hmoe(router_type="modse"))
    model = peft.get_peft_model(hmoe(router_type="modse"), lora_config(**parts))
    adapted = model_costs(model)
    assert adapted.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert adapted.parts["adapters"] == adapted.parameters - plain.parameters > 0
    assert {**adapted.parts, "adapters": 0} == plain.parts
    for convention in CONVENTIONS:
        assert adapted.forward_flops(convention) == plain.forward_flops(convention)


def test_inverse_size_load_sums_up_and_no_expert_gets_more_than_every_token():
    assert inverse_size_load([9, 11, 13, 15, 17, 19, 21, 23], 2) == pytest.approx(
        [0.40, 0.33, 0.28, 0.25, 0.23, 0.20, 0.17, 0.15], abs=0.02
    )
    capped = inverse_size_load([1, 100, 100, 50], 2)
    assert capped[0] == 1.0
    assert capped == pytest.approx([1, 0.25, 0.25, 0.5])
    assert inverse_size_load([5, 5], 2) == [1.0, 1.0]


MODELS = {
    "top_k": lambda: hmoe(experts_implementation="eager"),
    "top_p": lambda: hmoe(routing="top_p", experts_implementation="eager"),
    "modse": lambda: hmoe(router_type="modse", experts_implementation="eager"),
    "qk_norm-tied": lambda: hmoe(qk_norm=True, tie_word_embeddings=True, experts_implementation="eager"),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SMALL, intermediate_size=24, num_local_experts=4, experts_implementation="eager")
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=48)),
}


def counted(model, ids) -> RouterWindow:
    """What the trainer counts of one forward pass in training."""
    metrics = RouterMetrics(model_costs(model).forward_flops())
    options = {"output_router_logits": True} if model.config.model_type == "hmoe" else {}
    metrics.update(model.train()(input_ids=ids, use_cache=False, **options), {"input_ids": ids}, model.config)
    return metrics.collect(lambda tensor: tensor)


@pytest.mark.parametrize("name", MODELS)
def test_counted_flops_equal_a_literal_count_of_the_products(name):
    model = MODELS[name]()
    ids = torch.randint(0, 64, (3, LENGTH))
    window = counted(model, ids)
    assert window.padded_tokens == window.tokens == ids.numel()
    assert window.flops == 3 * literal_flops(model.eval(), ids)


def test_6nd_counts_six_times_the_activated_parameters():
    model = hmoe(expert_intermediate_sizes=[16] * 4)
    flops = model_costs(model).forward_flops("6nd")
    assert 3 * flops.count(10, LENGTH) == 6 * 10 * count_parameters(model.config).activated


def test_conventions_differ_by_attention_embedding_and_norms():
    with torch.device("meta"):
        model = HMoEForCausalLM(HMoEConfig.from_preset("hmoe-0.4b"))
    config, counts = model.config, count_parameters(model.config)
    matmul, paper = (3 * model_costs(model).forward_flops(name).count(1, 4096) for name in ("matmul", "6nd"))
    attention = 12 * config.num_hidden_layers * config.hidden_size * 4096
    assert matmul == paper + attention - 6 * (counts.embedding // 2 + counts.norms)
    assert 1.25 < matmul / paper < 1.4


def test_an_unknown_convention_is_refused():
    with pytest.raises(ValueError, match="flops_convention"):
        model_costs(hmoe()).forward_flops("6n")


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("name", ["top_k", "mixtral", "llama"])
def test_partitioned_parameters_count_whole(name, convention):
    model = MODELS[name]()
    whole = model_costs(model).forward_flops(convention)
    for parameter in model.parameters():  # as DeepSpeed ZeRO-3 does
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert model_costs(model).forward_flops(convention) == whole
