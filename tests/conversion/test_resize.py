"""HMoE to HMoE with other expert sizes."""

from __future__ import annotations

import pytest
import torch
from tiny_checkpoints import QUIET, add_tokenizer, load, logits_of, make_checkpoint, make_text

from hmoe import HMoEForCausalLM
from hmoe.conversion import ResizeSettings, convert_moe, convert_resize
from hmoe.conversion.layout import unpack_expert


@pytest.fixture
def source(tmp_path):
    """An HMoE of four experts of 48 neurons in each of three layers."""
    convert_moe(make_checkpoint(tmp_path / "mixtral", "mixtral"), tmp_path / "hmoe", QUIET)
    return tmp_path / "hmoe"


def _expert(model, layer, expert):
    experts = model.model.layers[layer].mlp.experts
    sizes = model.config.layer_expert_sizes[layer]
    return unpack_expert((experts.gate_up_proj, experts.down_proj), sizes, expert)


@pytest.mark.parametrize("sizes", [[48, 64, 56, 80], [[48, 64, 56, 80], [48] * 4, [49, 50, 51, 52]]])
def test_growing_changes_no_logit(tmp_path, source, sizes):
    result = convert_resize(source, tmp_path / "grown", ResizeSettings(sizes=sizes), QUIET)
    torch.testing.assert_close(logits_of(tmp_path / "grown"), logits_of(source), rtol=1e-5, atol=1e-5)
    assert result.check.exact and result.check.passed
    assert result.config.layer_expert_sizes == (sizes if isinstance(sizes[0], list) else [sizes] * 3)


def test_gradients_reach_grown_neurons(tmp_path, source):
    convert_resize(source, tmp_path / "grown", ResizeSettings(sizes=[64] * 4), QUIET)
    model = load(tmp_path / "grown")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.randint(256, (2, 20))
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    experts = model.model.layers[0].mlp.experts
    gradients = unpack_expert((experts.gate_up_proj.grad, experts.down_proj.grad), [64] * 4, 0)
    for part in ("gate", "up", "down"):
        assert gradients[part][48:].abs().sum() > 0, part


def test_shrinking_keeps_the_neurons_of_largest_weights(tmp_path, source):
    convert_resize(source, tmp_path / "shrunk", ResizeSettings(sizes=[16, 24, 32, 48]), QUIET)
    before, after = load(source), load(tmp_path / "shrunk")
    for layer in range(3):
        old, new = _expert(before, layer, 1), _expert(after, layer, 1)
        score = old["gate"].norm(dim=1) * old["up"].norm(dim=1) * old["down"].norm(dim=1)
        kept = score.topk(24).indices.sort().values
        for part in ("gate", "up", "down"):
            assert torch.equal(new[part], old[part][kept])
        assert torch.equal(_expert(after, layer, 3)["down"], _expert(before, layer, 3)["down"])


def test_shrinking_away_neurons_that_never_act_changes_nothing(tmp_path, source):
    add_tokenizer(source)
    model = load(source)
    with torch.no_grad():
        for layer in range(3):
            experts = model.model.layers[layer].mlp.experts
            # Large weights that cancel: only activations show that these neurons are useless.
            _expert(model, layer, 0)["down"][8:24].zero_()
            experts.down_proj[0, 8:24] = 0
            experts.gate_up_proj[0, 8:24] *= 100
    model.save_pretrained(source)
    settings = ResizeSettings(
        sizes=[32, 48, 48, 48], calibration_text=str(make_text(tmp_path / "text.txt")), calibration_tokens=512
    )
    convert_resize(source, tmp_path / "shrunk", settings, QUIET)
    torch.testing.assert_close(logits_of(tmp_path / "shrunk"), logits_of(source), rtol=1e-5, atol=1e-5)


def test_by_strategy_the_expert_of_largest_weights_becomes_the_largest_and_the_total_stays(tmp_path, source):
    model = load(source)
    with torch.no_grad():
        for layer in model.model.layers:
            for expert, scale in enumerate([0.1, 1.0, 10.0, 3.0]):
                layer.mlp.experts.down_proj[expert] *= scale
    model.save_pretrained(source)
    result = convert_resize(source, tmp_path / "resized", ResizeSettings(strategy="arithmetic"), QUIET)
    for row in result.config.layer_expert_sizes:
        assert sum(row) == 192
        assert sorted(range(4), key=lambda expert: row[expert]) == [0, 1, 3, 2]


def test_by_strategy_experts_that_text_does_not_use_become_the_smallest(tmp_path, source):
    add_tokenizer(source)
    model = load(source)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mlp.gate.weight)  # of equal logits the same two experts are taken every time
    model.save_pretrained(source)
    tokens = torch.randint(256, (1, 8))
    with torch.no_grad():
        used = model(input_ids=tokens, output_router_logits=True).router_index[0].unique().tolist()
    text = str(make_text(tmp_path / "text.txt"))
    settings = ResizeSettings(strategy="arithmetic", calibration_text=text, calibration_tokens=512)
    result = convert_resize(source, tmp_path / "resized", settings, QUIET)
    for row in result.config.layer_expert_sizes:
        assert sum(row) == 192
        assert sorted(sorted(range(4), key=lambda expert: row[expert])[2:]) == used


def test_tile_is_the_common_divisor_of_the_new_sizes(tmp_path, source):
    result = convert_resize(source, tmp_path / "resized", ResizeSettings(sizes=[16, 24, 32, 40]), QUIET)
    assert result.config.expert_tile_size == 8


def test_modse_router_is_carried_along(tmp_path, tiny_config):
    HMoEForCausalLM(tiny_config(router_type="modse", vocab_size=300)).save_pretrained(tmp_path / "modse")
    convert_resize(tmp_path / "modse", tmp_path / "grown", ResizeSettings(sizes=[16, 16, 24, 32]), QUIET)
    torch.testing.assert_close(logits_of(tmp_path / "grown"), logits_of(tmp_path / "modse"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"sizes": [48, 48]}, r"`sizes` has \[2, 2, 2\] experts by layer, the model has \[4, 4, 4\]"),
        ({"sizes": [0, 48, 48, 48]}, "expert 0 of layer 0 has size 0"),
        ({}, "give either `sizes` or `strategy`"),
        ({"sizes": [48] * 4, "strategy": "hybrid"}, "give either `sizes` or `strategy`"),
    ],
)
def test_bad_settings_are_refused(tmp_path, source, fields, message):
    with pytest.raises(ValueError, match=message):
        convert_resize(source, tmp_path / "resized", ResizeSettings(**fields), QUIET)
