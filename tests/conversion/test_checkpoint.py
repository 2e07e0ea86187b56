"""Sources that are refused, weights that are read and written."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import QUIET, make_checkpoint

from hmoe.conversion import DenseSettings, convert_dense, convert_moe
from hmoe.conversion.checkpoint import CheckpointReader, write_checkpoint


@pytest.fixture
def mixtral(tmp_path):
    return make_checkpoint(tmp_path / "mixtral", "mixtral")


def test_truncated_file_is_named(tmp_path, mixtral):
    weights = mixtral / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"{weights.name} .* is truncated, corrupt or not safetensors"):
        convert_moe(mixtral, tmp_path / "hmoe", QUIET)
    assert not list(tmp_path.glob("hmoe*"))


def test_missing_shard_is_named(tmp_path):
    source = make_checkpoint(tmp_path / "source", "mixtral", max_shard_size="40KB")
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        convert_moe(source, tmp_path / "hmoe", QUIET)


def test_missing_tensor_is_named(tmp_path, mixtral):
    _edit(mixtral, lambda state: state.pop("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(ValueError, match=r"lacks the tensor `model\.layers\.1\.self_attn\.q_proj\.weight`"):
        convert_moe(mixtral, tmp_path / "hmoe", QUIET)
    assert not list(tmp_path.glob("hmoe*"))


def test_tensor_that_would_be_lost_is_refused(tmp_path, mixtral):
    _edit(mixtral, lambda state: state.update({"model.layers.0.mlp.shared_expert.up_proj.weight": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"shared_expert\.up_proj\.weight"):
        convert_moe(mixtral, tmp_path / "hmoe", QUIET)
    assert not list(tmp_path.glob("hmoe*"))


def _edit(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickled_weights_are_refused_with_the_remedy(tmp_path, mixtral, name):
    (mixtral / "model.safetensors").unlink()
    (mixtral / name).write_text("{}")
    with pytest.raises(ValueError, match=r"pickles \(pytorch_model\.bin.*save them as safetensors first"):
        convert_moe(mixtral, tmp_path / "hmoe", QUIET)


def test_quantized_source_is_refused(tmp_path, mixtral):
    config = json.loads((mixtral / "config.json").read_text())
    (mixtral / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="`quantization_config`='gptq'"):
        convert_moe(mixtral, tmp_path / "hmoe", QUIET)


@pytest.mark.parametrize(
    "source, message", [("nowhere/at/all", "no such file or folder"), ("empty", "no config.json")]
)
def test_source_that_is_no_checkpoint_is_refused(tmp_path, source, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        convert_moe(tmp_path / source, tmp_path / "hmoe", QUIET)


def test_output_is_sharded_and_reads_back(tmp_path, monkeypatch):
    monkeypatch.setattr("hmoe.conversion.checkpoint.SHARD_BYTES", 3000)
    tensors = {f"t{i}": torch.randn(50, 7).to(dtype) for i, dtype in enumerate([torch.float32, torch.bfloat16] * 5)}
    tensors["scalar"] = torch.tensor(3, dtype=torch.int64)
    num_bytes = write_checkpoint(tmp_path, tensors.items(), progress=False)
    assert num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and all(path.stat().st_size < 3000 + 1000 for path in files)
    reader = CheckpointReader(tmp_path)
    assert set(reader.names) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(reader.tensor(name), tensor) and reader.tensor(name).dtype == tensor.dtype
    assert torch.equal(reader.tensor("t3", 4), tensors["t3"][4])


def test_part_of_a_larger_tensor_is_written_alone(tmp_path):
    bank = torch.randn(1000, 8)
    write_checkpoint(tmp_path, [("rows", bank[:2]), ("columns", bank[:2].t())], progress=False)
    assert (tmp_path / "model.safetensors").stat().st_size < 1000
    reader = CheckpointReader(tmp_path)
    assert torch.equal(reader.tensor("rows"), bank[:2]) and torch.equal(reader.tensor("columns"), bank[:2].t())


def test_of_a_hub_repository_only_the_weights_that_are_read_are_fetched(tmp_path, monkeypatch):
    repository = make_checkpoint(tmp_path / "repository", "llama", max_shard_size="40KB")
    for other in ("pytorch_model.bin", "consolidated.safetensors"):
        (repository / other).touch()
    cache = tmp_path / "cache"
    cache.mkdir()

    def snapshot_download(name, allow_patterns):
        for path in repository.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, cache)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    convert_dense("owner/name", tmp_path / "hmoe", DenseSettings(num_experts=4), QUIET)
    assert {path.suffix for path in cache.iterdir()} == {".json", ".safetensors"}
    assert not (cache / "consolidated.safetensors").exists()
    assert "base_model:\n- owner/name" in (tmp_path / "hmoe" / "README.md").read_text()
