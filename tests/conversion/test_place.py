"""`hmoe convert place`: the same function with the experts in another order."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import QUIET, logits_of
from transformers import AutoModelForSequenceClassification

import hmoe_cli
from hmoe import HMoEConfig, HMoEForCausalLM, HMoEForSequenceClassification
from hmoe.conversion import convert_place
from hmoe.conversion.place import read_load
from hmoe.placement import place_layers, split_experts


SIZES = {
    "one_list": [8, 16, 24, 32, 40, 48, 56, 64],
    "by_layer": [[8, 16, 24, 32], [32, 8, 8, 8, 8, 64]],
}
ROUTERS = {
    "top_k": {},
    "top_p": {"routing": "top_p", "router_top_p": 0.5},
    "modse": {"router_type": "modse"},
    "tied": {"tie_word_embeddings": True},
}


@torch.no_grad()
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("sizes", SIZES)
def test_placing_changes_no_logits(tiny_config, tmp_path, sizes, router):
    config = tiny_config(
        expert_intermediate_sizes=SIZES[sizes], initializer_range=0.2, vocab_size=300, **ROUTERS[router]
    )
    model = HMoEForCausalLM(config).eval()
    for layer in model.model.layers:
        if router == "modse":
            layer.mlp.gate.noise_norm.weight.normal_()
    model.save_pretrained(tmp_path / "trained")
    placements = place_layers(config.layer_expert_sizes, 2, "balanced")
    assert any(placement.order != sorted(placement.order) for placement in placements)
    conversion = convert_place(tmp_path / "trained", tmp_path / "placed", 2, method="balanced", options=QUIET)
    assert conversion.check.exact and conversion.check.passed
    placed = HMoEForCausalLM.from_pretrained(tmp_path / "placed").eval()
    for layer, placement in enumerate(placements):
        expected = [config.layer_expert_sizes[layer][expert] for expert in placement.order]
        assert placed.config.layer_expert_sizes[layer] == expected
    # The softmax sums the experts in another order.
    torch.testing.assert_close(logits_of(placed), logits_of(model), rtol=1e-5, atol=1e-5)


def test_whole_pairs_are_the_default_and_make_whole_experts_of_equal_runs(tiny_config, tmp_path):
    config = tiny_config(expert_intermediate_sizes=SIZES["one_list"])
    HMoEForCausalLM(config).save_pretrained(tmp_path / "trained")
    placed = convert_place(tmp_path / "trained", tmp_path / "placed", 4, options=QUIET).config
    assert split_experts(config, 4) and not split_experts(placed, 4)
    card = (tmp_path / "placed" / "README.md").read_text()
    assert "identity check" in card and '"method": "pairs"' in card and str(tmp_path) not in card


def test_weights_can_be_cast_on_the_way(tiny_config, tmp_path):
    HMoEForCausalLM(tiny_config()).save_pretrained(tmp_path / "trained")
    options = replace(QUIET, dtype="bfloat16")
    assert convert_place(tmp_path / "trained", tmp_path / "placed", 2, options=options).check.passed is True
    assert {t.dtype for t in load_file(tmp_path / "placed" / "model.safetensors").values()} == {torch.bfloat16}


@torch.no_grad()
def test_a_model_with_another_head_keeps_it(tiny_config, tmp_path):
    model = HMoEForSequenceClassification(tiny_config(num_labels=3, pad_token_id=0)).eval()
    model.save_pretrained(tmp_path / "trained")
    result = convert_place(tmp_path / "trained", tmp_path / "placed", 2, options=QUIET)
    assert result.check is None and "no language model head" in str(result)
    placed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "placed").eval()
    assert placed.config.architectures == ["HMoEForSequenceClassification"]
    ids = torch.randint(1, 64, (2, 16))
    torch.testing.assert_close(placed(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.fixture
def trained(tiny_config, tmp_path):
    """A folder with a model, and the metrics of the run that made it."""
    config = tiny_config(expert_intermediate_sizes=[8, 16, 24, 32])
    HMoEForCausalLM(config).save_pretrained(tmp_path / "trained")
    load = [[0.1, 0.1, 0.1, 1.7], [1.7, 0.1, 0.1, 0.1]]
    lines = [{"step": 1, "loss": 2.0, "load": [[0.5] * 4] * 2}, {"step": 2, "load": load}, {"step": 2, "eval_loss": 1}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_load(tmp_path / "metrics.jsonl") == load
    return tmp_path / "trained"


def test_a_checkpoint_is_placed_by_the_load_of_its_run(trained, tmp_path, capsys):
    (trained / "tokenizer_config.json").write_text("{}")
    options = ["--num_ranks", "2", "--method", "balanced", "--load", str(tmp_path / "metrics.jsonl")]
    assert hmoe_cli.main(["convert", "place", str(trained), str(tmp_path / "placed"), *options]) == 0
    assert "given load" in capsys.readouterr().out
    assert HMoEConfig.from_pretrained(tmp_path / "placed").layer_expert_sizes[0] == [32, 24, 16, 8]
    assert (tmp_path / "placed" / "tokenizer_config.json").exists()


def test_a_placement_that_cannot_be_leaves_nothing(trained, tmp_path, capsys):
    assert hmoe_cli.main(["convert", "place", str(trained), str(tmp_path / "bad"), "--num_ranks", "9"]) == 2
    assert "4 experts can be placed on 1 to 4 ranks" in capsys.readouterr().err
    assert not list(tmp_path.glob("bad*"))
    (tmp_path / "empty.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match="holds no `load`"):
        read_load(tmp_path / "empty.jsonl")


def test_the_module_of_before_still_places(trained, tmp_path):
    command = ["-m", "hmoe.training.placement", str(trained), str(tmp_path / "placed"), "--num_ranks", "2"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0 and "hmoe convert place" in done.stderr, done.stderr
    assert HMoEConfig.from_pretrained(tmp_path / "placed").layer_expert_sizes[0] != [8, 16, 24, 32]
