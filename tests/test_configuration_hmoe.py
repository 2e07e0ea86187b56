"""Configs: the papers' figures, counted parameters, expert sizes, refusals of bad values, and JSON round trips."""

import itertools
import json
import math
import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st

from hmoe import PRESETS, HMoEConfig, HMoEForCausalLM, count_parameters, expert_sizes
from hmoe.configuration_hmoe import CONFIG_FORMAT_VERSION
from hmoe.sizes import SIZE_STRATEGIES


# What a refusal may raise; the last wraps the other two where huggingface_hub checks a field or a config.
REFUSALS = (ValueError, TypeError, StrictDataclassError)

ODD_CONFIGS = {
    "sizes-by-layer": {"expert_intermediate_sizes": [[8, 16], [12, 20, 28]]},
    "grouped-query": {"num_key_value_heads": 1},
    "head-dim": {"head_dim": 6},
    "qk-norm": {"qk_norm": True},
    "attention-bias": {"attention_bias": True, "head_dim": 10},
    "tied": {"tie_word_embeddings": True},
    "modse": {"router_type": "modse"},
    "modse-sizes-by-layer": {"router_type": "modse", "expert_intermediate_sizes": [[8, 16], [8, 8, 24]]},
    "learned-activation": {"hidden_act": "prelu"},
    "small-tiles": {"expert_tile_size": 2},
    "top-p-capped": {"routing": "top_p", "max_experts_per_tok": 2},
    "one-expert": {"expert_intermediate_sizes": [24], "num_experts_per_tok": 1},
    "all-at-once": {
        "expert_intermediate_sizes": [[6, 9], [3, 3, 12]],
        "num_key_value_heads": 4,
        "head_dim": 10,
        "qk_norm": True,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "router_type": "modse",
        "hidden_act": "prelu",
    },
}
ANY_CONFIG = [pytest.param({"preset": name}, id=name) for name in PRESETS]
ANY_CONFIG += [pytest.param(overrides, id=name) for name, overrides in ODD_CONFIGS.items()]


@pytest.fixture
def any_config(request, tiny_config) -> HMoEConfig:
    """The config of a preset (`{"preset": name}`), or a tiny one with overrides."""
    if "preset" in request.param:
        return HMoEConfig.from_preset(request.param["preset"])
    return tiny_config(**request.param)


def meta_model(config: HMoEConfig) -> HMoEForCausalLM:
    with torch.device("meta"):
        return HMoEForCausalLM(config)


def text_of(overrides: dict) -> str:
    return ",".join(f"{name}={value!r}" for name, value in overrides.items())


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


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        ("hmoe-0.4b", [864, 1056, 1248, 1440, 1632, 1824, 2016, 2208]),
        ("hmoe-0.4b-hybrid", [768] * 4 + [1536] * 2 + [3072] * 2),
        ("moe-0.4b", [1536] * 8),
        ("dense-0.4b", [12288]),
        ("hmoe-3b", [2304, 2816, 3328, 3840, 4352, 4864, 5376, 5888]),
        ("hmoe-3b-hybrid", [2048] * 4 + [4096] * 2 + [8192] * 2),
        ("moe-3b", [4096] * 8),
        ("dense-1b", [32768]),
        ("modse-300m-x8", [6912, 768, 6144, 1536, 4608, 3072, 3840, 3840]),
        ("moe-300m-x8", [3840] * 8),
        ("moe-300m-x8-105", [4045] * 8),
        ("modse-700m-x8", [9216, 1024, 8192, 2048, 6144, 4096, 5120, 5120]),
        ("moe-700m-x8", [5120] * 8),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_preset_has_the_papers_expert_sizes(preset, sizes):
    """HMoE section 4.1 and Table 3, MoDSE Table 2."""
    assert HMoEConfig.from_preset(preset).expert_intermediate_sizes == sizes


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.endswith("top-p")])
def test_top_p_preset_has_the_papers_threshold_and_entropy_loss(preset):
    config = HMoEConfig.from_preset(preset)
    assert (config.routing, config.router_top_p, config.router_entropy_loss_coef) == ("top_p", 0.6, 3e-2)


def test_changing_a_config_leaves_its_preset_alone(monkeypatch):
    monkeypatch.setitem(PRESETS, "mine", {"expert_intermediate_sizes": [[8, 16], [8, 24]], "num_hidden_layers": 2})
    HMoEConfig.from_preset("mine").expert_intermediate_sizes[0][0] = 4
    assert HMoEConfig.from_preset("mine").expert_intermediate_sizes == [[8, 16], [8, 24]]


def test_preset_override_replaces_a_field_and_is_checked():
    assert HMoEConfig.from_preset("moe-0.4b", num_experts_per_tok=8).num_experts_per_tok == 8
    with pytest.raises(ValueError, match="`num_experts_per_tok`=9 is more than the 8 experts"):
        HMoEConfig.from_preset("moe-0.4b", num_experts_per_tok=9)


def test_unknown_preset_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"'hmoe-0\.4', did you mean 'hmoe-0\.4b'"):
        HMoEConfig.from_preset("hmoe-0.4")


@pytest.mark.parametrize("any_config", ANY_CONFIG, indirect=True)
def test_counted_parameters_are_the_real_ones_part_by_part(any_config):
    parts = {
        "embedding": r"embed_tokens|lm_head",
        "attention": r"self_attn\.[qkvo]_proj",
        "router": r"mlp\.gate|act_fn",
        "norms": r"norm",
        "experts": r"mlp\.experts",
    }
    real = dict.fromkeys(parts, 0)
    for name, parameter in meta_model(any_config).named_parameters():
        real[next(part for part, pattern in parts.items() if re.search(pattern, name))] += parameter.numel()
    counts = count_parameters(any_config)
    counted = {part: getattr(counts, part) for part in parts} | {"experts": sum(map(sum, counts.experts))}
    assert counted == real
    assert counts.total == sum(real.values())


@pytest.mark.parametrize("any_config", ANY_CONFIG, indirect=True)
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


@pytest.mark.parametrize(
    ("strategy", "sizes"),
    [
        ("arithmetic", [9, 11, 13, 15, 17, 19, 21, 23]),  # HMoE section 4
        ("geometric", [1, 2, 4, 8, 16, 32, 64, 128]),  # HMoE Fig. 8
        ("hybrid", [1, 1, 1, 1, 2, 2, 4, 4]),  # HMoE Fig. 8
        ("pairs", [9, 1, 8, 2, 6, 4, 5, 5]),  # MoDSE Table 2: ratios 4.5, 0.5, ... of the model dimension, doubled
        ("uniform", [3] * 8),
    ],
    ids=SIZE_STRATEGIES,
)
@pytest.mark.parametrize("unit", [1, 96], ids="unit{}".format)
def test_expert_sizes_are_the_papers_lists(strategy, sizes, unit):
    total = unit * sum(sizes)
    assert expert_sizes(strategy, 8, total=total, multiple_of=unit) == [unit * size for size in sizes]
    assert expert_sizes(strategy, 8, total=total) == [unit * size for size in sizes]


@given(
    strategy=st.sampled_from(list(SIZE_STRATEGIES)),
    fours=st.integers(1, 8),
    units=st.integers(1, 40),
    multiple_of=st.integers(1, 64),
)
def test_expert_sizes_sum_to_the_total_in_whole_units(strategy, fours, units, multiple_of):
    num_experts = 4 * fours  # every strategy exists for multiples of four
    total = num_experts * units * multiple_of
    sizes = expert_sizes(strategy, num_experts, total=total, multiple_of=multiple_of)
    assert len(sizes) == num_experts
    assert sum(sizes) == total
    assert all(size >= multiple_of and size % multiple_of == 0 for size in sizes)


@given(
    strategy=st.sampled_from(["arithmetic", "geometric"]),
    num_experts=st.integers(1, 64),
    units=st.integers(64, 5000),
    spread=st.none() | st.floats(1.01, 1e6),
)
def test_ladders_never_descend(strategy, num_experts, units, spread):
    sizes = expert_sizes(strategy, num_experts, total=units, spread=spread)
    assert sizes == sorted(sizes)
    assert sum(sizes) == units


@given(pairs=st.integers(1, 32), half=st.integers(1, 500), multiple_of=st.sampled_from([1, 8, 64]))
def test_neighbours_of_pairs_have_equal_sums_and_the_large_one_comes_first(pairs, half, multiple_of):
    sizes = expert_sizes("pairs", 2 * pairs, total=2 * pairs * half * multiple_of, multiple_of=multiple_of)
    assert {large + small for large, small in zip(sizes[::2], sizes[1::2])} == {2 * half * multiple_of}
    assert all(large >= small for large, small in zip(sizes[::2], sizes[1::2]))


@pytest.mark.parametrize("spread", [1, 1.5, 2.56, 10], ids="spread{}".format)
@pytest.mark.parametrize("strategy", ["arithmetic", "geometric"])
def test_spread_is_the_ratio_of_largest_to_smallest(strategy, spread):
    sizes = expert_sizes(strategy, 8, total=8_000_000, spread=spread)
    assert sizes[-1] / sizes[0] == pytest.approx(spread, rel=1e-4)


@pytest.mark.parametrize("spread", [None, 1e308], ids="spread{}".format)
@pytest.mark.parametrize("strategy", ["arithmetic", "geometric"])
def test_extreme_ladders_still_sum_to_the_total(strategy, spread):
    assert sum(expert_sizes(strategy, 1100, total=2000, spread=spread)) == 2000


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({"strategy": "linear"}, ["`strategy`", "'linear'", "arithmetic"]),
        ({"num_experts": 0}, ["`num_experts`", "0"]),
        ({"num_experts": True}, ["`num_experts`", "True"]),
        ({"num_experts": 4.0}, ["`num_experts`", "4.0"]),
        ({"total": -64}, ["`total`", "-64"]),
        ({"total": "64"}, ["`total`", "'64'"]),
        ({"multiple_of": 0}, ["`multiple_of`", "0"]),
        ({"total": 65, "multiple_of": 8}, ["`total`=65", "`multiple_of`=8", "64", "72"]),
        ({"total": 24, "multiple_of": 8}, ["`total`=24", "4 experts", "32"]),
        ({"strategy": "pairs", "num_experts": 3}, ["`num_experts`=3", "even"]),
        ({"strategy": "pairs", "total": 63}, ["`total`=63", "multiple of 2"]),
        ({"strategy": "hybrid", "num_experts": 6}, ["`num_experts`=6", "multiple of 4"]),
        ({"spread": 0.5}, ["`spread`", "0.5"]),
        ({"spread": math.nan}, ["`spread`", "nan"]),
        ({"spread": math.inf}, ["`spread`", "inf"]),
        ({"spread": "2"}, ["`spread`", "'2'"]),
        ({"strategy": "uniform", "spread": 2.0}, ["`spread`", "'uniform'"]),
    ],
    ids=lambda value: text_of(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_of_expert_sizes_are_refused(arguments, shown):
    with pytest.raises(ValueError) as refusal:
        expert_sizes(**{"strategy": "arithmetic", "num_experts": 4, "total": 64, **arguments})
    assert [part for part in shown if part not in str(refusal.value)] == []


INT_FIELDS = [
    *["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts_per_tok"],
    *["num_key_value_heads", "head_dim", "sliding_window", "max_position_embeddings"],
    *["max_experts_per_tok", "expert_tile_size"],
]
COEF_FIELDS = [
    *["load_balancing_loss_coef", "parameter_penalty_loss_coef", "router_entropy_loss_coef", "router_z_loss_coef"],
    "router_aux_loss_coef",
]
# Overrides of the tiny config (4 heads, hidden 32, 2 layers, sizes 8, 16, 24, 32), and what the message must show.
BAD_VALUES = [
    *[
        ({name: value}, [name, repr(value)])
        for name, value in [
            *itertools.product(INT_FIELDS, [0, -2]),
            *itertools.product(["rms_norm_eps", "initializer_range"], [-1e-6, math.nan, math.inf]),
            ("attention_dropout", -0.1),
            ("attention_dropout", 1.0),
            ("attention_dropout", math.nan),
            ("num_key_value_heads", 3),
            ("num_attention_heads", 5),
            ("head_dim", 7),
            ("pad_token_id", 64),
            ("expert_tile_size", 3),
            ("expert_tile_size", 16),
            ("num_experts_per_tok", 5),
            ("max_experts_per_tok", 5),
            *[("router_top_p", value) for value in (0, 0.0, -0.1, 1.01, math.nan, math.inf)],
            *itertools.product(COEF_FIELDS, [-0.1, math.nan, math.inf]),
        ]
    ],
    ({"hidden_size": 30}, ["`hidden_size`=30", "`num_attention_heads`=4", "`head_dim`"]),
    ({"expert_intermediate_sizes": []}, ["expert_intermediate_sizes", "[]"]),
    ({"expert_intermediate_sizes": [8, 0]}, ["expert_intermediate_sizes", "expert 1", "layer 0", "size 0"]),
    ({"expert_intermediate_sizes": [[8], [8, -8]]}, ["expert_intermediate_sizes", "expert 1", "layer 1", "size -8"]),
    ({"expert_intermediate_sizes": [[8, 8], []]}, ["expert_intermediate_sizes[1]", "[]"]),
    ({"expert_intermediate_sizes": [[8, 8]] * 3}, ["expert_intermediate_sizes", "3 lists", "`num_hidden_layers`=2"]),
    ({"expert_intermediate_sizes": [8]}, ["`num_experts_per_tok`=2", "1 experts", "expert_intermediate_sizes"]),
    ({"expert_intermediate_sizes": [[8, 8], [8]]}, ["`num_experts_per_tok`=2", "1 experts"]),
    (
        {"expert_tile_size": 8, "expert_intermediate_sizes": [8, 12]},
        ["`expert_tile_size`=8", "size 12", "divisor of 4"],
    ),
    ({"router_type": "modse", "routing": "top_p"}, ["`router_type`='modse'", "`routing`='top_p'"]),
    ({"router_type": "modse", "norm_topk_prob": False}, ["`router_type`='modse'", "`norm_topk_prob`=False"]),
    ({"routing": "topk"}, ["'routing'", "topk", "'top_k', 'top_p'"]),
    ({"router_type": "mod_se"}, ["'router_type'", "mod_se", "'linear', 'modse'"]),
    ({"load_balancing_counts": "top_1"}, ["'load_balancing_counts'", "top_1", "'activated', 'top1'"]),
    (
        {"parameter_penalty_normalizer": "avg"},
        ["'parameter_penalty_normalizer'", "avg", "'mean', 'max', 'sum', 'none'"],
    ),
    ({"router_loss_scope": "global"}, ["'router_loss_scope'", "global", "'micro_batch', 'global_batch'"]),
    ({"hidden_act": "swiglu"}, ["`hidden_act`", "'swiglu'", "'silu'"]),
    ({"rope_parameters": {"rope_type": "ntk"}}, ["rope_parameters", "'ntk'", "'yarn'"]),
    ({"rope_parameters": {"rope_type": "linear"}}, ["rope_parameters", "'linear'", "factor"]),
    ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, ["rope_parameters", "factor", "'2'"]),
    ({"rope_parameters": {"rope_theta": 0}}, ["rope_parameters", "rope_theta", "0"]),
    ({"rope_theta": "1e4"}, ["rope_parameters", "rope_theta", "'1e4'"]),
]
WRONG_TYPES = [
    ([*INT_FIELDS, "pad_token_id", "bos_token_id", "format_version"], ["8", 2.0, True, [8]]),
    (INT_FIELDS[:5], [None]),
    ([*COEF_FIELDS, "router_top_p", "attention_dropout"], ["0.1", True, None, [0.1]]),
    (["initializer_range", "rms_norm_eps"], ["0.1", True, None, [0.1]]),
    (["hidden_act", "routing", "router_type", "router_loss_scope"], [1, True, None, ["silu"]]),
    (["load_balancing_counts", "parameter_penalty_normalizer"], [1, True, None, ["mean"]]),
    (["use_cache", "tie_word_embeddings", "attention_bias", "qk_norm"], ["true", 1, None]),
    (["norm_topk_prob", "output_router_logits"], ["true", 1, None]),
    (["expert_intermediate_sizes"], [8, "8", (8, 16), [8, "16"], [8, 16.0], [True, 8], [[8], 8], [8, None]]),
    (["rope_parameters"], [1e4, "yarn", []]),
]


@pytest.mark.parametrize(
    ("overrides", "shown"), [pytest.param(overrides, shown, id=text_of(overrides)) for overrides, shown in BAD_VALUES]
)
def test_bad_value_is_refused_with_field_and_value(tiny_config, overrides, shown):
    with pytest.raises(REFUSALS) as refusal:
        tiny_config(**overrides)
    assert [part for part in shown if part not in str(refusal.value)] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, id=f"{name}={value!r}")
        for names, values in WRONG_TYPES
        for name, value in itertools.product(names, values)
    ],
)
def test_wrong_type_is_refused_with_field_and_value(tiny_config, name, value):
    with pytest.raises(REFUSALS) as refusal:
        tiny_config(**{name: value})
    assert name in str(refusal.value)
    assert str(value) in str(refusal.value) or type(value).__name__ in str(refusal.value)


def test_every_field_has_a_wrong_type_in_the_table():
    listed = {name for names, _ in WRONG_TYPES for name in names}
    own = {name for name in HMoEConfig.__annotations__ if name in HMoEConfig.__dataclass_fields__}
    assert own - listed == {"eos_token_id"}  # Transformers takes an id or a list of ids


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        *[(name, "expert_intermediate_sizes") for name in ("num_experts", "num_local_experts")],
        *[(name, "expert_intermediate_sizes") for name in ("intermediate_size", "moe_intermediate_size")],
        ("num_expert_per_tok", "did you mean `num_experts_per_tok`"),
        ("num_experts_per_token", "did you mean `num_experts_per_tok`"),
        ("experts_intermediate_sizes", "did you mean `expert_intermediate_sizes`"),
        ("router_topp", "did you mean `router_top_p`"),
        ("load_balance_loss_coef", "did you mean `load_balancing_loss_coef`"),
        ("tie_embeddings", "did you mean `tie_word_embeddings`"),
        ("layer_expert_sizes", "layer_expert_sizes"),  # a property: it cannot be set
        ("has_router_losses", "has_router_losses"),
    ],
)
def test_foreign_or_misspelt_field_is_refused_with_the_right_one(tiny_config, name, remedy):
    config_dict = tiny_config().to_dict()
    for make in (tiny_config, lambda **overrides: HMoEConfig.from_dict(config_dict, **overrides)):
        with pytest.raises(ValueError) as refusal:
            make(**{name: 4})
        assert f"`{name}`" in str(refusal.value)
        assert "4" in str(refusal.value)
        assert remedy in str(refusal.value)


LATER_VALUES = [
    ("num_experts_per_tok", 5),
    ("num_hidden_layers", 0),
    ("num_attention_heads", 3),
    ("router_top_p", 1.5),
    ("router_z_loss_coef", math.nan),
    ("expert_intermediate_sizes", [8, 12]),
    ("rope_parameters", None),
]


@pytest.mark.parametrize(("name", "value"), LATER_VALUES, ids=[f"{name}={value!r}" for name, value in LATER_VALUES])
def test_bad_value_assigned_later_is_refused_on_building_and_on_saving(tiny_config, tmp_path, name, value):
    config = tiny_config()
    setattr(config, name, value)
    with pytest.raises(REFUSALS, match=name if value != [8, 12] else "size 12"):
        meta_model(config)
    with pytest.raises(REFUSALS, match=name if value != [8, 12] else "size 12"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(("name", "value"), [("num_experts_per_tok", "2"), ("router_type", "noisy")])
def test_wrong_type_or_name_assigned_later_is_refused_at_once(tiny_config, name, value):
    with pytest.raises(StrictDataclassError, match=name):
        setattr(tiny_config(), name, value)


@pytest.mark.parametrize("name", ["expert_tile_size", "num_key_value_heads", "head_dim"])
def test_none_assigned_later_is_derived_anew(tiny_config, name):
    """The remedy that the refusal of a tile size itself names: `or None`."""
    config = tiny_config()
    config.expert_intermediate_sizes = [8, 16, 24, 40]
    setattr(config, name, None)
    model = meta_model(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(config).total
    assert getattr(config, name) == getattr(tiny_config(**{name: None}), name)


@pytest.mark.parametrize("any_config", ANY_CONFIG, indirect=True)
def test_json_round_trip_keeps_every_field(any_config, tmp_path):
    as_dict = any_config.to_dict()
    assert HMoEConfig.from_dict(json.loads(any_config.to_json_string(use_diff=False))).to_dict() == as_dict
    any_config.save_pretrained(tmp_path)
    assert HMoEConfig.from_pretrained(tmp_path).to_dict() == as_dict


def test_from_dict_applies_and_checks_overrides_with_the_rest(tiny_config):
    config_dict = tiny_config().to_dict()
    sizes = [[8, 8, 8], [16, 32, 8]]
    config = HMoEConfig.from_dict(config_dict, expert_intermediate_sizes=sizes, num_experts_per_tok=3)
    assert (config.layer_expert_sizes, config.num_experts_per_tok) == (sizes, 3)
    with pytest.raises(ValueError, match="`num_experts_per_tok`=9 is more than the 4 experts"):
        HMoEConfig.from_dict(config_dict, num_experts_per_tok=9)


def test_from_dict_hands_loading_arguments_back(tiny_config):
    loading = {"trust_remote_code": True, "device_map": "auto", "low_cpu_mem_usage": True, "offload_folder": "x"}
    _, unused = HMoEConfig.from_dict(tiny_config().to_dict(), return_unused_kwargs=True, **loading)
    assert unused == loading


def test_config_of_a_newer_format_is_refused_with_the_remedy(tiny_config):
    newer = tiny_config().to_dict() | {"format_version": CONFIG_FORMAT_VERSION + 1}
    with pytest.raises(ValueError, match=rf"`format_version`={CONFIG_FORMAT_VERSION + 1}: .*pip install -U hmoe"):
        HMoEConfig.from_dict(newer)


def test_config_of_another_model_is_refused_with_its_type(tiny_config):
    with pytest.raises(ValueError, match="`model_type`='mixtral', not 'hmoe'"):
        HMoEConfig.from_dict(tiny_config().to_dict() | {"model_type": "mixtral"})


COEFFICIENT = st.sampled_from([0, 0.0, 0.01, 1, 3.5])
SIZES = st.lists(st.sampled_from([4, 8, 12, 16, 40]), min_size=1, max_size=5)
PLAUSIBLE = {
    "vocab_size": st.integers(1, 80),
    "hidden_size": st.sampled_from([8, 24, 32]),
    "num_hidden_layers": st.integers(1, 3),
    "num_attention_heads": st.sampled_from([1, 2, 4, 8]),
    "num_key_value_heads": st.sampled_from([None, 1, 2, 4]),
    "head_dim": st.sampled_from([None, 2, 6, 8]),
    "hidden_act": st.sampled_from(["silu", "gelu", "prelu"]),
    "rms_norm_eps": st.sampled_from([0.0, 1e-6]),
    "pad_token_id": st.none() | st.integers(-2, 70),
    "eos_token_id": st.none() | st.integers(0, 5) | st.lists(st.integers(0, 5), max_size=2),
    "tie_word_embeddings": st.booleans(),
    "sliding_window": st.none() | st.integers(1, 8),
    "attention_bias": st.booleans(),
    "qk_norm": st.booleans(),
    "rope_parameters": st.sampled_from([None, {"rope_theta": 1e6}, {"rope_type": "linear", "factor": 2.0}]).map(
        lambda value: value and dict(value)
    ),
    "expert_intermediate_sizes": SIZES | st.lists(SIZES, min_size=1, max_size=3),
    "expert_tile_size": st.sampled_from([None, 1, 2, 4, 8]),
    "routing": st.sampled_from(["top_k", "top_p"]),
    "num_experts_per_tok": st.integers(1, 3),
    "norm_topk_prob": st.booleans(),
    "router_top_p": st.sampled_from([0.1, 0.6, 1, 1.0]),
    "max_experts_per_tok": st.none() | st.integers(1, 3),
    "router_type": st.sampled_from(["linear", "modse"]),
    "load_balancing_loss_coef": COEFFICIENT,
    "load_balancing_counts": st.sampled_from(["activated", "top1"]),
    "parameter_penalty_loss_coef": COEFFICIENT,
    "parameter_penalty_normalizer": st.sampled_from(["mean", "max", "sum", "none"]),
    "router_entropy_loss_coef": COEFFICIENT,
    "router_z_loss_coef": COEFFICIENT,
    "router_aux_loss_coef": COEFFICIENT,
    "router_loss_scope": st.sampled_from(["micro_batch", "global_batch"]),
    "format_version": st.integers(0, CONFIG_FORMAT_VERSION),
}
LEAVES = st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=4) | st.just(b"8")
GARBAGE = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "expert_intermediate_sizes": [8, 16, 24, 32],
}
NAMED = re.compile(rf"[`'](?:{'|'.join(HMoEConfig.__dataclass_fields__)})\b")


def assert_model_of_the_counted_size_or_refusal(**fields) -> None:
    try:
        config = HMoEConfig(**{**SMALL, **fields})
    except REFUSALS as refusal:
        assert NAMED.search(str(refusal)), str(refusal)
        return
    model = meta_model(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(config).total


@settings(max_examples=200)
@given(fields=st.fixed_dictionaries({}, optional=PLAUSIBLE))
def test_plausible_fields_give_a_model_of_the_counted_size_or_a_refusal_that_names_one(fields):
    assert_model_of_the_counted_size_or_refusal(**fields)


@pytest.mark.parametrize("name", PLAUSIBLE)
@settings(max_examples=12)
@given(value=GARBAGE, others=st.fixed_dictionaries({}, optional=PLAUSIBLE))
def test_garbage_gives_a_model_of_the_counted_size_or_a_refusal_that_names_a_field(name, value, others):
    assert_model_of_the_counted_size_or_refusal(**{**others, name: value})
