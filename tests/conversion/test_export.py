"""HMoE to Mixtral and Qwen3-MoE by zero padding."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import QUIET, logits_of
from transformers import MixtralForCausalLM, Qwen3MoeForCausalLM

from hmoe import HMoEForCausalLM, count_parameters
from hmoe.conversion import CannotConvert, convert_export


@pytest.fixture
def make_hmoe(tmp_path, tiny_config):
    def make(**overrides):
        model = HMoEForCausalLM(tiny_config(vocab_size=300, initializer_range=0.2, **overrides))
        model.save_pretrained(tmp_path / "hmoe")
        return tmp_path / "hmoe"

    return make


LAYERED = [[8, 16, 24, 32], [48, 8, 8, 8]]


@pytest.mark.parametrize(
    "overrides, stock_class",
    [
        ({}, MixtralForCausalLM),
        ({"expert_intermediate_sizes": LAYERED}, MixtralForCausalLM),
        ({"num_experts_per_tok": 1, "tie_word_embeddings": True, "sliding_window": 16}, MixtralForCausalLM),
        ({"head_dim": 16, "hidden_act": "gelu"}, MixtralForCausalLM),
        ({"qk_norm": True}, Qwen3MoeForCausalLM),
        ({"qk_norm": True, "norm_topk_prob": False, "attention_bias": True, "head_dim": 16}, Qwen3MoeForCausalLM),
        ({"qk_norm": True, "sliding_window": 16, "expert_intermediate_sizes": LAYERED}, Qwen3MoeForCausalLM),
    ],
)
def test_stock_class_gives_the_same_logits(tmp_path, make_hmoe, overrides, stock_class):
    source = make_hmoe(**overrides)
    result = convert_export(source, tmp_path / "stock", options=QUIET)
    model, info = stock_class.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits_of(model.eval()), logits_of(source), rtol=1e-5, atol=1e-5)
    assert result.check.exact and result.check.passed


def test_files_have_the_names_that_other_runtimes_read(tmp_path, make_hmoe):
    convert_export(make_hmoe(), tmp_path / "mixtral", options=QUIET)
    state = load_file(tmp_path / "mixtral" / "model.safetensors")
    assert state["model.layers.0.block_sparse_moe.gate.weight"].shape == (4, 32)
    assert state["model.layers.0.block_sparse_moe.experts.3.w1.weight"].shape == (32, 32)
    assert state["model.layers.1.block_sparse_moe.experts.0.w2.weight"].shape == (32, 32)
    assert not list((tmp_path / "mixtral").glob("*.py"))


def test_reported_cost_of_padding_is_the_real_one(tmp_path, make_hmoe):
    source = make_hmoe(expert_intermediate_sizes=LAYERED)
    result = convert_export(source, tmp_path / "mixtral", options=QUIET)
    before = sum(tensor.numel() for tensor in load_file(source / "model.safetensors").values())
    after = sum(tensor.numel() for tensor in load_file(tmp_path / "mixtral" / "model.safetensors").values())
    (note,) = [note for note in result.notes if "padding" in note]
    assert f"{before:,} -> {after:,} (+{100 * (after - before) / before:.1f} %)" in note
    assert f"disk +{4 * (after - before) / 1e6:,.1f} MB" in note


def test_equal_sizes_cost_no_padding(tmp_path, make_hmoe):
    source = make_hmoe(expert_intermediate_sizes=[16] * 4)
    config = HMoEForCausalLM.from_pretrained(source).config
    result = convert_export(source, tmp_path / "mixtral", options=QUIET)
    total = count_parameters(config).total
    assert f"{total:,} -> {total:,} (+0.0 %)" in str(result)


@pytest.mark.parametrize(
    "overrides, to, field, value",
    [
        ({"routing": "top_p"}, "auto", "routing", "top_p"),
        ({"router_type": "modse"}, "auto", "router_type", "modse"),
        ({"norm_topk_prob": False}, "auto", "norm_topk_prob", False),
        ({"attention_bias": True}, "auto", "attention_bias", True),
        ({"qk_norm": True}, "mixtral", "qk_norm", True),
        ({}, "qwen3_moe", "qk_norm", False),
        (
            {"expert_intermediate_sizes": [[8] * 4, [8] * 6]},
            "auto",
            "expert_intermediate_sizes",
            "[4, 6] experts by layer",
        ),
        (
            {"expert_intermediate_sizes": [[8] * 2, [8] * 6], "qk_norm": True},
            "auto",
            "expert_intermediate_sizes",
            "[2, 6] experts by layer",
        ),
    ],
)
def test_refusals_name_field_and_value(tmp_path, make_hmoe, overrides, to, field, value):
    with pytest.raises(CannotConvert) as error:
        convert_export(make_hmoe(**overrides), tmp_path / "stock", to=to, options=QUIET)
    assert (error.value.field, error.value.value) == (field, value)
    assert f"`{field}`={value!r}" in str(error.value)
    assert not (tmp_path / "stock").exists()


def test_losses_that_stock_models_lack_are_reported(tmp_path, make_hmoe):
    source = make_hmoe(parameter_penalty_loss_coef=0.1, load_balancing_loss_coef=0.01, router_aux_loss_coef=0.5)
    result = convert_export(source, tmp_path / "mixtral", options=QUIET)
    assert result.config.router_aux_loss_coef == 0.005
    assert "`parameter_penalty_loss_coef`=0.1" in str(result)
