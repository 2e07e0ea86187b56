"""Mixtral, Qwen3-MoE and OLMoE to HMoE and back."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import CONFIGS, MOE, QUIET, load, logits_of, make_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from hmoe.conversion import CannotConvert, convert_export, convert_moe
from hmoe.conversion.families import MOE_FAMILIES, MoEFamily


@pytest.mark.parametrize("name", MOE)
def test_logits_are_kept(tmp_path, name):
    source = make_checkpoint(tmp_path / "source", name)
    result = convert_moe(source, tmp_path / "hmoe", QUIET)
    torch.testing.assert_close(logits_of(tmp_path / "hmoe"), logits_of(source), rtol=1e-5, atol=1e-5)
    assert result.check.exact and result.check.passed


@pytest.mark.parametrize("variant", ["fused", "sharded", "tied"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_every_way_a_checkpoint_is_stored_is_read(tmp_path, name, variant):
    kwargs = {
        "fused": {"spelling": "fused"},
        "sharded": {"max_shard_size": "40KB"},
        "tied": {"tie_word_embeddings": True},
    }[variant]
    source = make_checkpoint(tmp_path / "source", name, **kwargs)
    if variant == "sharded":
        assert len(list(source.glob("*.safetensors"))) > 2
    convert_moe(source, tmp_path / "hmoe", QUIET)
    torch.testing.assert_close(logits_of(tmp_path / "hmoe"), logits_of(source), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mixtral", "mixtral-window", "qwen3_moe", "qwen3_moe-norm", "qwen3_moe-dense"])
def test_round_trip_is_bit_for_bit(tmp_path, name, dtype):
    source = make_checkpoint(tmp_path / "source", name, dtype=dtype)
    convert_moe(source, tmp_path / "hmoe", QUIET)
    convert_export(tmp_path / "hmoe", tmp_path / "again", options=QUIET)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype and torch.equal(value, after[key]), key


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe-norm", "qwen3_moe-dense"])
def test_round_trip_keeps_the_config(tmp_path, name):
    source = make_checkpoint(tmp_path / "source", name)
    convert_moe(source, tmp_path / "hmoe", QUIET)
    convert_export(tmp_path / "hmoe", tmp_path / "again", options=QUIET)
    before, after = (AutoConfig.from_pretrained(folder).to_dict() for folder in (source, tmp_path / "again"))
    ignored = {"intermediate_size"} if name == "qwen3_moe-norm" else set()  # of dense layers, and it has none
    changed = {key for key in before if before[key] != after.get(key)} - {"_name_or_path", *ignored}
    # Both spellings compute the same; a head size that is not given is worked out.
    assert changed <= {"head_dim", "sliding_window"}


def test_mixtral_settings_are_carried_over(tmp_path):
    source = make_checkpoint(tmp_path / "source", "mixtral", output_router_logits=True)
    convert_moe(source, tmp_path / "hmoe", QUIET)
    config = AutoConfig.from_pretrained(tmp_path / "hmoe")
    assert config.expert_intermediate_sizes == [48] * 4
    assert config.expert_tile_size == 48
    assert config.load_balancing_loss_coef == 0.02
    assert config.parameter_penalty_loss_coef == 0
    assert config.router_aux_loss_coef == 1.0
    assert config.output_router_logits


def test_jitter_which_only_training_uses_is_reported(tmp_path):
    source = make_checkpoint(tmp_path / "source", "mixtral", router_jitter_noise=0.1)
    assert "`router_jitter_noise`=0.1" in str(convert_moe(source, tmp_path / "hmoe", QUIET))


@pytest.mark.parametrize(
    "name, overrides, field, value",
    [
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv", 8.0),
        ("olmoe", {"num_attention_heads": 4, "num_key_value_heads": 4}, "num_attention_heads", 4),
        ("qwen3_moe-dense", {"intermediate_size": 42}, "intermediate_size", 42),
        ("llama", {}, "model_type", "llama"),
    ],
)
def test_refusals_name_field_and_value(tmp_path, name, overrides, field, value):
    source = make_checkpoint(tmp_path / "source", name, **overrides)
    with pytest.raises(CannotConvert, match=f"`{field}`={value!r}") as error:
        convert_moe(source, tmp_path / "hmoe", QUIET)
    assert (error.value.field, error.value.value) == (field, value)
    assert not (tmp_path / "hmoe").exists()


def test_dense_layers_of_qwen3_moe_become_experts_that_are_always_active(tmp_path):
    source = make_checkpoint(tmp_path / "source", "qwen3_moe-dense")
    convert_moe(source, tmp_path / "hmoe", QUIET)
    model = load(tmp_path / "hmoe")
    assert model.config.layer_expert_sizes == [[24] * 6, [10] * 4, [24] * 6]
    assert not model.model.layers[1].mlp.gate.weight.any()


def test_dtype_is_cast_on_request(tmp_path):
    source = make_checkpoint(tmp_path / "source", "mixtral")
    options = QUIET.__class__(dtype="bfloat16", progress=False)
    result = convert_moe(source, tmp_path / "hmoe", options)
    tensors = load_file(tmp_path / "hmoe" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(tmp_path / "hmoe").dtype == torch.bfloat16
    assert not result.check.exact


class ToyConfig(MixtralConfig):
    model_type = "toy_moe"
    attribute_map = {"num_experts": "num_local_experts", "expert_width": "intermediate_size"}


class ToyForCausalLM(MixtralForCausalLM):
    config_class = ToyConfig


@pytest.fixture
def toy_family(monkeypatch):
    """A family that the package does not know: Mixtral's function under other names."""
    AutoConfig.register("toy_moe", ToyConfig, exist_ok=True)
    AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM, exist_ok=True)
    merge = MergeModulelist(dim=0)
    names_on_disk = [
        WeightRenaming(".feed_forward.", ".mlp."),
        WeightConverter(
            [".experts.*.a.weight", ".experts.*.b.weight"], ".experts.gate_up_proj", [merge, Concatenate(1)]
        ),
        WeightConverter([".experts.*.c.weight"], ".experts.down_proj", [merge]),
    ]
    register_checkpoint_conversion_mapping("toy_moe", names_on_disk, overwrite=True)
    fields = {"intermediate_size": 48, "num_local_experts": 4, "sliding_window": 16}
    monkeypatch.setitem(CONFIGS, "toy_moe", (ToyConfig, fields))
    family = MoEFamily(
        attention_bias=False,
        sliding_window=True,
        width="expert_width",
        block="feed_forward",
        parts={"gate": "a", "up": "b", "down": "c"},
    )
    monkeypatch.setitem(MOE_FAMILIES, "toy_moe", family)


@pytest.mark.parametrize("spelling", ["hub", "fused"])
def test_an_added_family_is_one_record(tmp_path, toy_family, spelling):
    source = make_checkpoint(tmp_path / "source", "toy_moe", spelling=spelling)
    on_disk = "feed_forward.experts.0.a.weight" if spelling == "hub" else "mlp.experts.gate_up_proj"
    assert f"model.layers.0.{on_disk}" in load_file(source / "model.safetensors")
    result = convert_moe(source, tmp_path / "hmoe", QUIET)
    torch.testing.assert_close(logits_of(tmp_path / "hmoe"), logits_of(source), rtol=1e-5, atol=1e-5)
    assert result.check.exact and result.check.passed
