"""Checkpoints: exact round trips, and refusal of bad ones by name."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hmoe


@pytest.fixture
def save(tiny_config) -> Callable[..., hmoe.HMoEForCausalLM]:
    """Saves a tiny causal LM to a folder: `save(folder, shard="1GB", **config_overrides)`."""

    def save_tiny(folder: Path, *, shard: str = "1GB", **overrides) -> hmoe.HMoEForCausalLM:
        model = hmoe.HMoEForCausalLM(tiny_config(**overrides))
        model.save_pretrained(folder, max_shard_size=shard)
        return model

    return save_tiny


def assert_same_state(left: torch.nn.Module, right: torch.nn.Module) -> None:
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, id="plain"),
        pytest.param({"expert_intermediate_sizes": [[8, 16, 24], [32, 8]]}, id="sizes_by_layer"),
        pytest.param({"expert_tile_size": 4}, id="tile_below_gcd"),
        pytest.param({"router_type": "modse"}, id="modse"),
        pytest.param({"qk_norm": True, "attention_bias": True}, id="qk_norm_and_bias"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
    ],
)
@pytest.mark.parametrize("shard", ["1GB", "20KB"], ids=["one_file", "sharded"])
def test_saved_and_loaded_weights_are_equal(save, tmp_path, overrides, shard):
    model = save(tmp_path, shard=shard, **overrides)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    loaded, info = hmoe.HMoEForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_state(loaded, model)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()


def test_bfloat16_weights_come_back_as_bfloat16(tiny_config, tmp_path):
    model = hmoe.HMoEForCausalLM(tiny_config()).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert_same_state(hmoe.HMoEForCausalLM.from_pretrained(tmp_path, dtype="auto"), model)


def test_tied_embeddings_are_on_disk_once_and_tied_again(save, tmp_path):
    save(tmp_path, tie_word_embeddings=True)
    names = load_file(tmp_path / "model.safetensors")
    assert [name for name in names if "embed" in name or "head" in name] == ["model.embed_tokens.weight"]
    loaded = hmoe.HMoEForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_expert_banks_on_disk_have_the_documented_names_and_shapes(save, tmp_path):
    sizes = [[8, 16, 24], [32, 8]]
    model = save(tmp_path, expert_intermediate_sizes=sizes, expert_tile_size=4)
    banks = {name: list(t.shape) for name, t in load_file(tmp_path / "model.safetensors").items() if "experts" in name}
    tile, hidden = 4, model.config.hidden_size
    expected = {}
    for layer, layer_sizes in enumerate(sizes):
        num_tiles = sum(layer_sizes) // tile
        expected[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = [num_tiles, 2 * tile, hidden]
        expected[f"model.layers.{layer}.mlp.experts.down_proj"] = [num_tiles, tile, hidden]
    assert banks == expected


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.mark.parametrize("load", [hmoe.HMoEForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: cut(path, 0.5), id="truncated"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_text("<!DOCTYPE html><title>404</title>"), id="html_page"),
    ],
)
@pytest.mark.parametrize("shard", ["1GB", "20KB"], ids=["one_file", "sharded"])
def test_a_broken_weights_file_is_named(save, tmp_path, shard, damage, load):
    save(tmp_path, shard=shard)
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    damage(path)
    with pytest.raises(ValueError, match="truncated or not safetensors") as error:
        load(tmp_path)
    assert str(path) in str(error.value)
    assert f"{path.stat().st_size} bytes" in str(error.value)


def test_a_broken_weights_file_in_a_subfolder_is_named(save, tmp_path):
    save(tmp_path / "step-10")
    cut(tmp_path / "step-10" / "model.safetensors", 0.5)
    with pytest.raises(ValueError, match="truncated or not safetensors") as error:
        hmoe.HMoEForCausalLM.from_pretrained(tmp_path, subfolder="step-10")
    assert str(tmp_path / "step-10" / "model.safetensors") in str(error.value)


def test_a_missing_shard_is_named(save, tmp_path):
    save(tmp_path, shard="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        hmoe.HMoEForCausalLM.from_pretrained(tmp_path)


def test_a_truncated_shard_index_is_named(save, tmp_path):
    save(tmp_path, shard="20KB")
    cut(tmp_path / "model.safetensors.index.json", 0.5)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        hmoe.HMoEForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.gate.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_named(save, tmp_path, name):
    save(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match="lacks 1 tensor") as error:
        hmoe.HMoEForCausalLM.from_pretrained(tmp_path)
    assert f"`{name}`" in str(error.value) and str(tmp_path) in str(error.value)


def test_a_tensor_missing_from_a_given_state_dict_is_named(tiny_config):
    config = tiny_config()
    tensors = hmoe.HMoEForCausalLM(config).state_dict()
    del tensors["model.layers.1.mlp.gate.weight"]
    with pytest.raises(ValueError, match=r"`model\.layers\.1\.mlp\.gate\.weight`") as error:
        hmoe.HMoEForCausalLM.from_pretrained(None, config=config, state_dict=tensors)
    assert "None" not in str(error.value)


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"expert_intermediate_sizes": [8, 16, 24, 40]}, "model.layers.0.mlp.experts.gate_up_proj"),
        ({"expert_intermediate_sizes": [8, 16, 24, 24, 8]}, "model.layers.1.mlp.gate.weight"),
        ({"expert_tile_size": 4}, "model.layers.0.mlp.experts.down_proj"),
        ({"vocab_size": 65}, "lm_head.weight"),
    ],
    ids=["a_size", "number_of_experts", "tile", "vocabulary"],
)
def test_a_tensor_of_another_shape_than_the_config_says_is_named_with_both_shapes(save, tmp_path, changes, name):
    save(tmp_path, expert_intermediate_sizes=[8, 16, 24, 32])
    on_disk = load_file(tmp_path / "model.safetensors")[name].shape
    edit_config(tmp_path, **changes)
    expected = hmoe.HMoEForCausalLM(AutoConfig.from_pretrained(tmp_path)).get_parameter(name).shape
    with pytest.raises(ValueError, match="shape") as error:
        hmoe.HMoEForCausalLM.from_pretrained(tmp_path)
    assert all(text in str(error.value) for text in (f"`{name}`", str(tuple(on_disk)), str(tuple(expected))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(
    "tensor, overrides",
    [("weight", {}), ("noise_weight", {"router_type": "modse"}), ("noise_norm.weight", {"router_type": "modse"})],
    ids=["weight", "noise_weight", "noise_norm"],
)
def test_a_router_that_is_not_finite_is_named(save, tmp_path, tensor, overrides, value, dtype):
    save(tmp_path, **overrides)
    name = f"model.layers.1.mlp.gate.{tensor}"
    edit_tensors(tmp_path, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    with pytest.raises(ValueError, match="finite") as error:
        hmoe.HMoEForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert f"`{name}`" in str(error.value)


@pytest.fixture
def llama(tmp_path) -> Path:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("loader", [hmoe.HMoEForCausalLM, hmoe.HMoEConfig])
def test_a_checkpoint_of_another_model_type_is_refused(llama, loader):
    with pytest.raises(ValueError, match="'llama', not 'hmoe'"):
        loader.from_pretrained(llama)


def test_a_checkpoint_of_another_model_is_refused_whatever_config_is_given(tiny_config, llama):
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.gate\.weight"):
        hmoe.HMoEForCausalLM.from_pretrained(llama, config=tiny_config())


@pytest.mark.parametrize("loader", [hmoe.HMoEForCausalLM, hmoe.HMoEConfig, AutoModelForCausalLM, AutoConfig])
class TestBadConfigFile:
    def test_of_a_newer_format_names_both_versions(self, save, tmp_path, loader):
        config = save(tmp_path).config
        edit_config(tmp_path, format_version=config.format_version + 1)
        with pytest.raises(ValueError, match=f"`format_version`={config.format_version + 1}.*newer"):
            loader.from_pretrained(tmp_path)

    def test_with_a_format_version_that_is_no_number_is_refused(self, save, tmp_path, loader):
        save(tmp_path)
        edit_config(tmp_path, format_version="two")
        with pytest.raises(StrictDataclassError, match=r"(?s)format_version.*int"):
            loader.from_pretrained(tmp_path)

    @pytest.mark.parametrize("share", [0, 0.5], ids=["empty", "truncated"])
    def test_of_broken_json_is_named(self, save, tmp_path, loader, share):
        save(tmp_path)
        cut(tmp_path / "config.json", share)
        with pytest.raises(OSError, match=r"config\.json.*not a valid JSON"):
            loader.from_pretrained(tmp_path)

    def test_that_is_missing_is_named(self, save, tmp_path, loader):
        save(tmp_path)
        (tmp_path / "config.json").unlink()
        with pytest.raises((OSError, ValueError), match=r"config\.json"):
            loader.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "head", ["HMoEForSequenceClassification", "HMoEForTokenClassification", "HMoEForQuestionAnswering"]
)
def test_a_new_head_starts_on_the_pretrained_body(save, tmp_path, head):
    model = save(tmp_path)
    loaded, info = getattr(hmoe, head).from_pretrained(tmp_path, output_loading_info=True)
    assert_same_state(getattr(loaded, loaded.base_model_prefix), model.model)
    assert info["missing_keys"] and not any(name.startswith("model.") for name in info["missing_keys"])
    assert set(info["unexpected_keys"]) <= {"lm_head.weight"}


def test_ignore_mismatched_sizes_replaces_a_head_and_keeps_the_body(tiny_config, tmp_path):
    saved = hmoe.HMoEForSequenceClassification(tiny_config(num_labels=3))
    saved.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`score\.weight`"):
        hmoe.HMoEForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    loaded, info = hmoe.HMoEForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert_same_state(loaded.model, saved.model)
    assert loaded.score.out_features == 5
    assert [name for name, *_ in info["mismatched_keys"]] == ["score.weight"]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"device_map": "cpu"}, id="cpu"),
        pytest.param({"device_map": "auto"}, id="auto"),
        pytest.param({"device_map": {"": "cpu"}}, id="mapping"),
        pytest.param({"low_cpu_mem_usage": True}, id="low_cpu_mem_usage"),
        pytest.param({"device_map": {"lm_head": "cpu", "model": "disk"}}, id="offloaded_to_disk"),
    ],
)
def test_placement_options_do_not_change_the_outputs(save, tmp_path, options):
    model = save(tmp_path)
    if "disk" in str(options):
        options = {**options, "offload_folder": tmp_path / "offload"}
    placed = hmoe.HMoEForCausalLM.from_pretrained(tmp_path, **options)
    input_ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(placed(input_ids).logits, model.eval()(input_ids).logits)


def test_loading_to_the_meta_device_reads_no_weights(save, tmp_path):
    model = save(tmp_path)
    loaded = hmoe.HMoEForCausalLM.from_pretrained(tmp_path, device_map="meta")
    assert {parameter.device.type for parameter in loaded.parameters()} == {"meta"}
    assert [p.shape for p in loaded.parameters()] == [p.shape for p in model.parameters()]


def test_a_state_dict_can_be_given_instead_of_a_folder(tiny_config):
    model = hmoe.HMoEForCausalLM(tiny_config())
    loaded = hmoe.HMoEForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert_same_state(loaded, model)
