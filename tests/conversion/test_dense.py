"""Llama, Mistral, Qwen2 and Qwen3 to HMoE: splits and copies."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import CONFIGS, DENSE, QUIET, add_tokenizer, load, logits_of, make_checkpoint, make_text

from hmoe.conversion import CannotConvert, DenseSettings, convert_dense
from hmoe.conversion.check import ForcedRouting, force_routing
from hmoe.conversion.dense import choose_sizes
from hmoe.conversion.neurons import assign_with_capacity, cluster_neurons, deal_neurons, fitted_router


SIZES = [12, 20, 28, 36]


def _experts(folder, sizes):
    """Per layer: the experts' gate rows [I, H] and down rows [I, H], read off the stored banks."""
    state = load_file(folder / "model.safetensors")
    layers = []
    for layer in range(3):
        gate_up = state[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        down = state[f"model.layers.{layer}.mlp.experts.down_proj"]
        tile = down.shape[1]
        gates, downs = gate_up[:, :tile].reshape(-1, 32), down.reshape(-1, 32)
        layers.append((gates.split(sizes), downs.split(sizes)))
    return layers


@pytest.mark.parametrize("name", DENSE)
def test_split_with_all_experts_active_and_neutral_gates_is_the_dense_model(tmp_path, name):
    source = make_checkpoint(tmp_path / "source", name)
    settings = DenseSettings(sizes=SIZES, num_experts_per_tok=4, neurons="random")
    convert_dense(source, tmp_path / "hmoe", settings, QUIET)
    model = load(tmp_path / "hmoe")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mlp.gate.weight)
    torch.testing.assert_close(logits_of(model), logits_of(source), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", DENSE)
def test_upcycled_top_1_of_a_full_width_expert_is_the_dense_model(tmp_path, name):
    source = make_checkpoint(tmp_path / "source", name)
    settings = DenseSettings(method="upcycle", sizes=[24, 96, 48])
    convert_dense(source, tmp_path / "hmoe", settings, QUIET)
    model = load(tmp_path / "hmoe")
    force_routing(model, ForcedRouting([[1]] * 3, 1.0, ""))
    torch.testing.assert_close(logits_of(model), logits_of(source), rtol=1e-5, atol=2e-5)


def test_upcycled_full_width_experts_are_the_dense_model_whatever_the_router_says(tmp_path):
    source = make_checkpoint(tmp_path / "source", "llama")
    settings = DenseSettings(method="upcycle", strategy="uniform", num_experts=4)
    convert_dense(source, tmp_path / "hmoe", settings, QUIET)
    torch.testing.assert_close(logits_of(tmp_path / "hmoe"), logits_of(source), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("variant", ["sharded", "tied"])
def test_every_way_a_checkpoint_is_stored_is_read(tmp_path, variant):
    kwargs = {
        "sharded": {"max_shard_size": "40KB"},
        "tied": {"tie_word_embeddings": True},
    }
    source = make_checkpoint(tmp_path / "source", "llama", **kwargs[variant])
    result = convert_dense(source, tmp_path / "hmoe", DenseSettings(sizes=SIZES), QUIET)
    assert result.check.forced and result.check.largest_difference < 1e-5 * result.check.largest_logit
    state = load_file(tmp_path / "hmoe" / "model.safetensors")
    assert ("lm_head.weight" in state) == (variant == "sharded")


@pytest.mark.parametrize("neurons", ["random", "magnitude", "activation", "coactivation"])
def test_split_uses_each_neuron_once(tmp_path, neurons):
    source = make_checkpoint(tmp_path / "source", "llama")
    add_tokenizer(source)
    text = make_text(tmp_path / "text.txt")
    settings = DenseSettings(sizes=SIZES, neurons=neurons, calibration_text=str(text), calibration_tokens=512)
    result = convert_dense(source, tmp_path / "hmoe", settings, QUIET)
    dense = load_file(source / "model.safetensors")
    for layer, (gates, downs) in enumerate(_experts(tmp_path / "hmoe", SIZES)):
        gate = dense[f"model.layers.{layer}.mlp.gate_proj.weight"]
        order = [int((row == gate).all(dim=1).nonzero()) for row in torch.cat(gates)]
        assert sorted(order) == list(range(96))
        expected_down = dense[f"model.layers.{layer}.mlp.down_proj.weight"].t()[order]
        assert torch.equal(torch.cat(downs), 2 * expected_down)
    assert result.check.passed and result.check.forced


@pytest.mark.parametrize("output_scale, factor", [("sum", 2), ("expected", 4)])
def test_output_scale_multiplies_down_proj(tmp_path, output_scale, factor):
    source = make_checkpoint(tmp_path / "source", "llama")
    settings = DenseSettings(sizes=SIZES, output_scale=output_scale)
    result = convert_dense(source, tmp_path / "hmoe", settings, QUIET)
    dense = load_file(source / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    downs = torch.cat(_experts(tmp_path / "hmoe", SIZES)[0][1])
    torch.testing.assert_close(downs.norm(), factor * dense.norm())
    assert result.check.passed and result.check.forced


@pytest.mark.parametrize("num_experts_per_tok, exact", [(2, True), (3, False)])
def test_half_precision_split_is_exact_where_the_scale_is_a_power_of_two(tmp_path, num_experts_per_tok, exact):
    source = make_checkpoint(tmp_path / "source", "llama", dtype=torch.bfloat16)
    settings = DenseSettings(sizes=SIZES, num_experts_per_tok=num_experts_per_tok)
    check = convert_dense(source, tmp_path / "hmoe", settings, QUIET).check
    assert check.exact == exact and check.passed
    state = load_file(tmp_path / "hmoe" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


def test_upcycled_experts_keep_the_most_important_neurons(tmp_path):
    source = make_checkpoint(tmp_path / "source", "llama")
    convert_dense(source, tmp_path / "hmoe", DenseSettings(method="upcycle", sizes=[24, 96]), QUIET)
    dense = load_file(source / "model.safetensors")
    for layer, (gates, _) in enumerate(_experts(tmp_path / "hmoe", [24, 96])):
        prefix = f"model.layers.{layer}.mlp"
        gate, up = dense[f"{prefix}.gate_proj.weight"], dense[f"{prefix}.up_proj.weight"]
        score = gate.norm(dim=1) * up.norm(dim=1) * dense[f"{prefix}.down_proj.weight"].norm(dim=0)
        assert torch.equal(gates[0], gate[score.topk(24).indices.sort().values])
        assert torch.equal(gates[1], gate)


def test_reinitialised_share_of_neurons_is_drawn_anew(tmp_path):
    source = make_checkpoint(tmp_path / "source", "llama")
    settings = DenseSettings(method="upcycle", sizes=[96, 96], reinit_share=0.25)
    convert_dense(source, tmp_path / "hmoe", settings, QUIET)
    gate = load_file(source / "model.safetensors")["model.layers.0.mlp.gate_proj.weight"]
    down = load_file(source / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].t()
    gates, downs = _experts(tmp_path / "hmoe", [96, 96])[0]
    renewed = [(rows != gate).any(dim=1) for rows in gates]
    assert [int(rows.sum()) for rows in renewed] == [24, 24]
    assert not torch.equal(renewed[0], renewed[1])
    assert torch.equal(renewed[0], (downs[0] != down).any(dim=1))
    torch.testing.assert_close(gates[0][renewed[0]].std(), gate.std(), rtol=0.15, atol=0)


def test_noise_makes_copies_differ_by_its_share(tmp_path):
    source = make_checkpoint(tmp_path / "source", "llama")
    settings = DenseSettings(method="upcycle", sizes=[96, 96], noise=0.1)
    convert_dense(source, tmp_path / "hmoe", settings, QUIET)
    gate = load_file(source / "model.safetensors")["model.layers.0.mlp.gate_proj.weight"]
    gates = _experts(tmp_path / "hmoe", [96, 96])[0][0]
    torch.testing.assert_close((gates[0] - gate).std(), 0.1 * gate.std(), rtol=0.1, atol=0)
    assert not torch.equal(gates[0], gates[1])


@pytest.mark.parametrize("router", ["random", "balanced"])
def test_router_starts_near_equal_weights_and_with_every_expert_in_use(tmp_path, router):
    source = make_checkpoint(tmp_path / "source", "llama")
    add_tokenizer(source)
    text = str(make_text(tmp_path / "text.txt"))
    settings = DenseSettings(sizes=SIZES, router=router, calibration_text=text, calibration_tokens=512)
    convert_dense(source, tmp_path / "hmoe", settings, QUIET)
    model = load(tmp_path / "hmoe")
    tokens = torch.randint(256, (2, 64))
    with torch.no_grad():
        outputs = model(input_ids=tokens, output_router_logits=True)
    for logits, index in zip(outputs.router_logits, outputs.router_index):
        assert 0.03 < logits.std() < 0.3
        assert set(index.flatten().tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("balanced", [False, True])
def test_fitted_router_finds_the_experts_that_contribute_most(balanced):
    hidden_states = torch.randn(4000, 16)
    hidden_states[:, 2] = 1  # what all tokens have in common
    parts = [torch.arange(0, 10), torch.arange(10, 30)]
    # The first expert's neurons answer to one direction, the second's, with thrice the output, to another.
    drive = [hidden_states[:, :1].sigmoid().expand(-1, 10), 3 * hidden_states[:, 1:2].sigmoid().expand(-1, 20)]
    down = torch.ones(30, 16) / torch.tensor([10.0] * 10 + [20.0] * 20).unsqueeze(1)
    router = fitted_router(hidden_states, torch.cat(drive, 1), down, parts, 0.1, balanced=balanced)
    logits = hidden_states @ router.t()
    torch.testing.assert_close(logits.std(), torch.tensor(0.1), rtol=1e-3, atol=0)
    first = logits[:, 0] > logits[:, 1]
    if balanced:
        more_than_usual = hidden_states[:, 0] > hidden_states[:, 1]
        assert (first == more_than_usual).float().mean() > 0.9
        assert 0.4 < first.float().mean() < 0.6
    else:
        larger = drive[0][:, 0] > drive[1][:, 0]
        assert (first == larger).float().mean() > 0.9
        assert 0 < first.float().mean() < 0.2


def test_clusters_of_neurons_that_fire_together_stay_together():
    patterns = torch.rand(3, 200).gt(0.7).float()
    owner = torch.tensor([0] * 20 + [1] * 30 + [2] * 50)[torch.randperm(100)]
    neurons = (patterns[owner] * (0.5 + torch.rand(100, 200))).t()
    parts = cluster_neurons(neurons, [20, 50, 30], torch.Generator().manual_seed(0))
    assert [len(part) for part in parts] == [20, 50, 30]
    assert [owner[part].unique().tolist() for part in parts] == [[0], [2], [1]]


def test_dealt_neurons_give_every_expert_a_like_share_of_importance():
    importance = torch.rand(1000) ** 3
    sizes = [100, 200, 300, 400]
    parts = deal_neurons(importance, sizes)
    assert sorted(torch.cat(parts).tolist()) == list(range(1000))
    for part, size in zip(parts, sizes):
        assert len(part) == size
        torch.testing.assert_close(importance[part].mean(), importance.mean(), rtol=0.03, atol=0)


def test_assignment_fills_every_expert_to_its_size():
    distance = torch.zeros(10, 3)
    distance[:, 1:] = 1  # all prefer the first
    parts = assign_with_capacity(distance, [2, 5, 3])
    assert [len(part) for part in parts] == [2, 5, 3]


@pytest.mark.parametrize("strategy", ["arithmetic", "hybrid", "pairs", "uniform"])
def test_default_sizes_fit_the_ffn(strategy):
    split = choose_sizes(DenseSettings(strategy=strategy), 1536)
    assert sum(split) == 1536
    upcycled = choose_sizes(DenseSettings(method="upcycle", strategy=strategy), 1536)
    assert 1400 <= max(upcycled) <= 1536


def test_sizes_may_differ_by_layer(tmp_path):
    source = make_checkpoint(tmp_path / "source", "llama")
    rows = [SIZES, [48, 48], [8] * 12]
    result = convert_dense(source, tmp_path / "hmoe", DenseSettings(sizes=rows), QUIET)
    assert result.config.layer_expert_sizes == rows
    assert result.check.forced and result.check.passed


@pytest.mark.parametrize(
    "name, overrides, field, value",
    [
        ("llama", {"mlp_bias": True}, "mlp_bias", True),
        ("qwen2-window", {"max_window_layers": 1}, "layer_types", None),
        ("mixtral", {}, "model_type", "mixtral"),
    ],
)
def test_refusals_name_field_and_value(tmp_path, name, overrides, field, value):
    assert name in CONFIGS
    source = make_checkpoint(tmp_path / "source", name, **overrides)
    with pytest.raises(CannotConvert, match=f"`{field}`=") as error:
        convert_dense(source, tmp_path / "hmoe", DenseSettings(sizes=SIZES), QUIET)
    assert error.value.field == field
    assert value is None or error.value.value == value


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"sizes": [12, 20]}, r"`sizes`=\[12, 20\] sum to 32, but the dense FFN has 96"),
        ({"method": "upcycle", "sizes": [97]}, "an expert of 97 neurons is wider than the dense FFN of 96"),
        ({"neurons": "coactivation"}, "needs `calibration_text`"),
        ({"noise": 0.1}, "`noise`=0.1"),
        ({"method": "upcycle", "neurons": "random"}, "`neurons` must be one of"),
        ({"method": "upcycle", "reinit_share": 1.5}, "`reinit_share`=1.5"),
    ],
)
def test_bad_settings_are_refused(tmp_path, fields, message):
    source = make_checkpoint(tmp_path / "source", "llama")
    with pytest.raises(ValueError, match=message):
        convert_dense(source, tmp_path / "hmoe", DenseSettings(**fields), QUIET)


def test_calibration_without_a_tokenizer_is_refused(tmp_path):
    source = make_checkpoint(tmp_path / "source", "llama")
    text = str(make_text(tmp_path / "text.txt"))
    settings = DenseSettings(neurons="activation", calibration_text=text, sizes=SIZES)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        convert_dense(source, tmp_path / "hmoe", settings, QUIET)
    assert not list(tmp_path.glob("hmoe*"))
