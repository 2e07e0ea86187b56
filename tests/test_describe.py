import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import hmoe_cli
from hmoe import HMoEConfig, HMoEForCausalLM
from hmoe.costs import model_costs
from hmoe.describe import describe, homogeneous_twin, load_config, main, report


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"router_type": "modse"},
        {"tie_word_embeddings": True, "attention_bias": True, "qk_norm": True},
        {"expert_intermediate_sizes": [[8, 16, 24, 32], [8, 8, 40]]},
        {"sliding_window": 16},
        {"routing": "top_p"},
    ],
    ids=["top_k", "modse", "tied-bias-norm", "sizes-by-layer", "window", "top_p"],
)
def test_parameters_are_the_real_ones_and_flops_those_that_training_counts(tiny_config, overrides) -> None:
    config = tiny_config(**overrides)
    with torch.device("meta"):
        model = HMoEForCausalLM(config)
    described = describe(config, context=32)
    assert described["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert described["flops_per_token"] == pytest.approx(model_costs(model).forward_flops().count(1, 32))


SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
STOCK = {
    "mixtral": MixtralConfig(**SIZES, intermediate_size=72, num_local_experts=4),
    "olmoe": OlmoeConfig(**SIZES, intermediate_size=48, num_experts=6, num_experts_per_tok=3, pad_token_id=0),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES,
        head_dim=16,
        moe_intermediate_size=40,
        num_experts=8,
        num_experts_per_tok=2,
        intermediate_size=96,
        mlp_only_layers=[1],
    ),
    "qwen2_moe": Qwen2MoeConfig(
        **SIZES,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=80,
        num_experts=6,
        num_experts_per_tok=2,
    ),
    "llama": LlamaConfig(**SIZES, intermediate_size=144, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, intermediate_size=144, sliding_window=16),
    "qwen2": Qwen2Config(**SIZES, intermediate_size=144),
    "gemma": GemmaConfig(**SIZES, head_dim=32, intermediate_size=144),
}


@pytest.mark.parametrize("name", STOCK)
def test_other_types_have_the_parameters_experts_and_cache_of_the_real_model(name, tmp_path, capsys) -> None:
    config = STOCK[name]
    config.save_pretrained(tmp_path)
    arguments = [str(tmp_path), "--context", "12", "--batch_size", "2", "--dtype", "float32"]
    assert main([*arguments, "--json"]) == 0
    described = json.loads(capsys.readouterr().out)["model"]
    model = AutoModelForCausalLM.from_config(config)
    named = dict(model.named_parameters())
    parameters = sum(parameter.numel() for parameter in named.values())
    banks = {key: value for key, value in named.items() if ".experts." in key}
    assert described["parameters"] == parameters
    assert described["expert_parameters"] == sum(bank.numel() for bank in banks.values())
    used = sum(bank[: config.num_experts_per_tok].numel() for bank in banks.values())
    assert described["activated"] == parameters - described["expert_parameters"] + used
    assert len(described["layer_sizes"]) == len({key.split(".experts.")[0] for key in banks})
    cache = model(input_ids=torch.randint(512, (2, 12)), use_cache=True).past_key_values
    assert described["kv_cache_bytes"] == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert ("all activated" in printed) == (not banks)
    assert "tile" not in printed


@pytest.mark.parametrize("sliding_window", [None, 32])
def test_mixtral_costs_what_the_hmoe_of_its_sizes_costs(sliding_window) -> None:
    fields = {**SIZES, "sliding_window": sliding_window}
    stock = MixtralConfig(**fields, intermediate_size=72, num_local_experts=4)
    same = HMoEConfig(**fields, expert_intermediate_sizes=[72] * 4)
    (ours, theirs) = (report(config, context=64, batch_size=3)["model"] for config in (same, stock))
    # HMoE's backward keeps less.
    layout = ("tile_size", "num_tiles", "activation_bytes", "activation_bytes_checkpointing")
    assert {key: value for key, value in theirs.items() if key not in layout} == {
        key: value if not isinstance(value, float) else pytest.approx(value)
        for key, value in ours.items()
        if key not in layout
    }


@pytest.mark.parametrize("name", ["hmoe", "hmoe-qk_norm", *STOCK])
def test_estimated_activations_are_close_to_what_autograd_keeps(name) -> None:
    config = STOCK.get(name) or HMoEConfig(
        **SIZES, expert_intermediate_sizes=[48, 96], qk_norm=name.endswith("qk_norm")
    )
    model = AutoModelForCausalLM.from_config(config)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(512, (4, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(input_ids=ids, labels=ids)
    measured = sum(kept.values())
    assert outputs.loss.requires_grad
    described = report(config, context=64, batch_size=4)["model"]
    assert described["activation_bytes"] >= described["activation_bytes_checkpointing"]
    assert described["activation_bytes"] == pytest.approx(measured, rel=0.2)


def test_cache_bytes_are_those_of_a_real_cache_and_weights_follow_the_dtype(tiny_config) -> None:
    config = tiny_config()
    outputs = HMoEForCausalLM(config)(input_ids=torch.randint(64, (2, 16)), use_cache=True)
    layers = outputs.past_key_values.layers
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    described = describe(config, context=16, batch_size=2, dtype="float32")
    assert described["kv_cache_bytes"] == real
    assert described["weight_bytes"] == 2 * describe(config)["weight_bytes"] == described["parameters"] * 4


def test_hmoe_paper_figures_activated_parameters_and_ratio() -> None:
    described = report(HMoEConfig.from_preset("hmoe-0.4b"))
    assert described["twin"]["activated"] == pytest.approx(162.5e6, rel=1e-3)  # printed: 163 M
    assert described["model"]["activated_ratio_inverse_size"] == pytest.approx(0.228, abs=5e-4)
    assert report(HMoEConfig.from_preset("moe-0.4b"))["twin"] is None


def test_twin_keeps_the_total_width_of_every_layer(tiny_config) -> None:
    config = tiny_config(expert_intermediate_sizes=[[8, 16, 24, 32], [8, 8, 32]], qk_norm=True)
    twin = homogeneous_twin(config)
    assert twin.layer_expert_sizes == [[20] * 4, [16] * 3]
    assert twin.qk_norm
    assert twin.load_balancing_loss_coef == 0.01
    assert describe(twin)["parameters"] == describe(config)["parameters"]


def test_presets_folders_and_recipes_are_read(tmp_path, tiny_config, capsys) -> None:
    tiny_config().save_pretrained(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model:\n  preset: hmoe-0.4b\n  model_config:\n    vocab_size: 100\n")
    assert load_config(str(tmp_path)).hidden_size == 32
    assert load_config(str(tmp_path / "config.json")).hidden_size == 32
    assert load_config(str(recipe)).vocab_size == 100
    recipe.write_text("model_type: mixtral\ntrain_tokenizer: 300\nmodel_config: {rms_norm_eps: 1e-5}\n")
    mixtral = load_config(str(recipe))
    assert (mixtral.model_type, mixtral.vocab_size, mixtral.rms_norm_eps) == ("mixtral", 300, 1e-5)
    assert main([str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["model"]["layer_sizes"] == [[8, 16, 24, 32]] * 2
    assert main([str(tmp_path), "--context", "64"]) == 0
    assert "homogeneous twin" in capsys.readouterr().out


def test_bad_input_is_refused_with_the_value_and_a_remedy(tmp_path, tiny_config, capsys) -> None:
    stock = {name: str(tmp_path / name) for name in ("gpt2", "llama", "mixed")}
    GPT2Config().save_pretrained(stock["gpt2"])
    STOCK["llama"].save_pretrained(stock["llama"])
    Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=1, num_hidden_layers=2).save_pretrained(
        stock["mixed"]
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lama", "hidden_size": 32}))
    bad_recipe, no_vocabulary = tmp_path / "recipe.yaml", tmp_path / "vocabulary.yaml"
    bad_recipe.write_text("model:\n  model: gpt2\n")
    no_vocabulary.write_text("model_type: llama\n")
    for arguments, words in (
        (["hmoe-0.5b"], "did you mean 'hmoe-0.4b'"),
        ([str(tmp_path)], "`lama`"),
        ([stock["gpt2"]], "type 'gpt2' cannot be described: `transformer.wte.weight` [50257, 768] is not known"),
        ([stock["llama"], "--num_ranks", "2"], "see `hmoe convert`"),
        ([stock["llama"], "--experts_per_token", "2"], "Top-P routing; the routing of this model is 'dense'"),
        ([stock["llama"], "--batch_size", "0"], "`batch_size` must be at least 1, got 0"),
        ([stock["mixed"]], "`sliding_window`=8 on some layers only"),
        ([str(no_vocabulary)], "set `model_config.vocab_size`"),
        ([str(tmp_path / "nothing")], "no such file"),
        ([str(bad_recipe)], "unknown key `model`"),
        (["hmoe-0.4b", "--context", "0"], "`context` must be at least 1, got 0"),
        (["hmoe-0.4b", "--experts_per_token", "3"], "num_experts_per_tok"),
        (["hmoe-0.4b-top-p", "--experts_per_token", "9"], "from 1 to 8"),
    ):
        assert hmoe_cli.main(["describe", *arguments]) == 2
        assert words in capsys.readouterr().err
