"""What a conversion leaves on disk: atomic, complete, described; broken sources and the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import QUIET, add_tokenizer, load, logits_of, make_checkpoint, make_text
from transformers import AutoTokenizer

import hmoe_cli
from hmoe.conversion import CheckFailed, DenseSettings, convert_dense, convert_moe
from hmoe.conversion.check import CheckResult
from hmoe.conversion.checkpoint import CheckpointReader, CheckpointWriter


KILLED = """
import os, signal, sys
from hmoe.conversion import base, checkpoint, convert_moe
source, target, moment = sys.argv[1:]
checkpoint.SHARD_BYTES = 10_000

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "writing":
    written, write = [], base.CheckpointWriter.write
    def write_some(self, name, tensor):
        written.append(name)
        kill() if len(written) > 20 else write(self, name, tensor)
    base.CheckpointWriter.write = write_some
else:
    base._write_card = kill  # all files but card and config are there
convert_moe(source, target)
"""


@pytest.fixture
def mixtral(tmp_path):
    return make_checkpoint(tmp_path / "mixtral", "mixtral")


def test_killed_conversion_leaves_nothing_that_loads_and_can_be_run_again(tmp_path, mixtral):
    processes = {
        moment: subprocess.Popen([sys.executable, "-c", KILLED, mixtral, tmp_path / moment, moment])
        for moment in ("writing", "finished")
    }
    for moment, process in processes.items():
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / moment).exists()
        left = tmp_path / f"{moment}.incomplete"
        assert list(left.iterdir())
        with pytest.raises((OSError, ValueError)):
            load(left)
        convert_moe(mixtral, tmp_path / moment, QUIET)
        torch.testing.assert_close(logits_of(tmp_path / moment), logits_of(mixtral), rtol=1e-5, atol=1e-5)
        assert not left.exists()


def test_failed_conversion_leaves_nothing(tmp_path, mixtral, monkeypatch):
    monkeypatch.setattr(CheckpointWriter, "finish", lambda self: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        convert_moe(mixtral, tmp_path / "hmoe", QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixtral"]


def test_failed_check_leaves_nothing(tmp_path, mixtral, monkeypatch):
    monkeypatch.setattr(CheckResult, "passed", False)
    with pytest.raises(CheckFailed, match="largest logit difference"):
        convert_moe(mixtral, tmp_path / "hmoe", QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixtral"]


def test_wrong_weights_fail_the_check(tmp_path, mixtral, monkeypatch):
    write = CheckpointWriter.write

    def spoil(self, name, tensor):
        write(self, name, tensor * 1.01 if name.endswith("layers.1.mlp.experts.down_proj") else tensor)

    monkeypatch.setattr(CheckpointWriter, "write", spoil)
    with pytest.raises(CheckFailed):
        convert_moe(mixtral, tmp_path / "hmoe", QUIET)


def test_existing_target_is_replaced_only_on_request(tmp_path, mixtral):
    target = tmp_path / "hmoe"
    convert_moe(mixtral, target, replace(QUIET, check=False))
    (target / "marker").touch()
    with pytest.raises(ValueError, match="--overwrite"):
        convert_moe(mixtral, target, QUIET)
    assert (target / "marker").exists()
    convert_moe(mixtral, target, replace(QUIET, overwrite=True, check=False))
    assert not (target / "marker").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hmoe", "mixtral"]


def test_folder_that_is_no_checkpoint_is_never_replaced(tmp_path, mixtral):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").touch()
    with pytest.raises(ValueError, match="no checkpoint"):
        convert_moe(mixtral, tmp_path / "home", replace(QUIET, overwrite=True))
    for holder in (mixtral, tmp_path):
        with pytest.raises(ValueError, match="is, or holds, the source"):
            convert_moe(mixtral, holder, replace(QUIET, overwrite=True))
    assert (tmp_path / "home" / "letter.txt").exists() and (mixtral / "config.json").exists()


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
    with CheckpointWriter(tmp_path, progress=False) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and all(path.stat().st_size < 3000 + 1000 for path in files)
    reader = CheckpointReader(tmp_path)
    assert set(reader.names) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(reader.tensor(name), tensor) and reader.tensor(name).dtype == tensor.dtype
    assert torch.equal(reader.tensor("t3", 4), tensors["t3"][4])


def test_part_of_a_larger_tensor_is_written_alone(tmp_path):
    bank = torch.randn(1000, 8)
    with CheckpointWriter(tmp_path, progress=False) as writer:
        writer.write("rows", bank[:2])
        writer.write("columns", bank[:2].t())
    assert (tmp_path / "model.safetensors").stat().st_size < 1000
    reader = CheckpointReader(tmp_path)
    assert torch.equal(reader.tensor("rows"), bank[:2]) and torch.equal(reader.tensor("columns"), bank[:2].t())


def test_output_folder_has_all_that_it_needs_elsewhere(tmp_path, mixtral):
    tokenizer = add_tokenizer(mixtral)
    (mixtral / "LICENSE").write_text("terms")
    convert_moe(mixtral, tmp_path / "hmoe", replace(QUIET, command=["convert", "moe", "a folder", "hmoe"]))
    saved = load(tmp_path / "hmoe")
    saved.save_pretrained(tmp_path / "saved")
    code = {path.name for path in (tmp_path / "saved").glob("*.py")}
    assert code and code == {path.name for path in (tmp_path / "hmoe").glob("*.py")}
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("hmoe", "saved")]
    assert configs[0]["auto_map"]["AutoModelForCausalLM"] == "modeling_hmoe.HMoEForCausalLM"
    assert configs[0] == configs[1]
    assert (tmp_path / "hmoe" / "generation_config.json").read_bytes() == (
        mixtral / "generation_config.json"
    ).read_bytes()
    copied = AutoTokenizer.from_pretrained(tmp_path / "hmoe")
    assert copied.chat_template == tokenizer.chat_template
    assert copied("two words")["input_ids"] == tokenizer("two words")["input_ids"]
    assert (tmp_path / "hmoe" / "LICENSE").read_text() == "terms"
    card = (tmp_path / "hmoe" / "README.md").read_text()
    assert "hmoe convert moe 'a folder' hmoe" in card
    assert "largest logit difference" in card


def test_check_says_what_text_it_used(tmp_path, mixtral):
    assert convert_moe(mixtral, tmp_path / "a", QUIET).check.text == "random ids"
    add_tokenizer(mixtral)
    assert convert_moe(mixtral, tmp_path / "b", QUIET).check.text == "the Gettysburg Address"
    text = make_text(tmp_path / "words.txt")
    assert convert_moe(mixtral, tmp_path / "c", replace(QUIET, check_text=str(text))).check.text == "words.txt"


def test_check_is_skipped_where_memory_does_not_hold_the_model(tmp_path, mixtral, monkeypatch):
    monkeypatch.setattr("hmoe.conversion.base.fits_in_memory", lambda num_parameters: False)
    result = convert_moe(mixtral, tmp_path / "hmoe", QUIET)
    assert result.check is None and "do not fit into free memory" in str(result)


def test_same_seed_gives_the_same_weights(tmp_path):
    source = make_checkpoint(tmp_path / "llama", "llama")
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        settings = DenseSettings(neurons="random", num_experts=4, seed=seed)
        convert_dense(source, tmp_path / name, settings, replace(QUIET, check=False))
        states.append(load_file(tmp_path / name / "model.safetensors"))
    key = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(states[0][key], states[1][key])
    assert not torch.equal(states[0][key], states[2][key])


def test_command_line_end_to_end(tmp_path, capsys):
    source = make_checkpoint(tmp_path / "llama", "llama")
    add_tokenizer(source)
    text = str(make_text(tmp_path / "text.txt"))
    calibration = ["--calibration_text", text, "--calibration_tokens", "512"]
    folders = [str(tmp_path / name) for name in ("llama", "split", "resized", "mixtral", "again")]
    steps = [
        ["dense", *folders[:2], "--num_experts", "4", "--neurons", "coactivation", "--router", "fitted", *calibration],
        ["resize", *folders[1:3], "--sizes", "[40,32,48,24]"],
        ["export", *folders[2:4], "--to", "mixtral"],
        ["moe", *folders[3:5], "--dtype", "bfloat16"],
    ]
    for step in steps:
        assert hmoe_cli.main(["convert", *step]) == 0
        assert "largest logit difference" in capsys.readouterr().out
    assert "hmoe convert export" in (tmp_path / "mixtral" / "README.md").read_text()
    assert hmoe_cli.main(["convert", *steps[0]]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_the_option_that_is_gone_is_refused_with_the_remedy(capsys):
    with pytest.raises(SystemExit):
        hmoe_cli.main(["convert", "moe", "a", "b", "--max_shard_gb", "1"])
    assert "--max_shard_gb is gone" in capsys.readouterr().err


@pytest.mark.parametrize("sizes", ["[1,", '"a"', "[]", "[1.5]", "[[1], 2]"])
def test_bad_sizes_on_the_command_line_are_refused(sizes, capsys):
    with pytest.raises(SystemExit):
        hmoe_cli.main(["convert", "dense", "a", "b", "--sizes", sizes])
    assert "--sizes" in capsys.readouterr().err


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
