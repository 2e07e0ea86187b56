"""What a conversion leaves on disk: atomic, complete, checked, described."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import QUIET, add_tokenizer, load, logits_of, make_checkpoint, make_text
from transformers import AutoTokenizer

from hmoe.conversion import CheckFailed, DenseSettings, convert_dense, convert_moe
from hmoe.conversion.check import CheckResult


KILLED = """
import os, signal, sys
from hmoe.conversion import base, checkpoint, convert_moe
source, target, moment = sys.argv[1:]
checkpoint.SHARD_BYTES = 10_000

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "writing":
    written, save_file = [], checkpoint.save_file
    def save_some(tensors, path, **kwargs):
        written.extend(tensors)
        kill() if len(written) > 20 else save_file(tensors, path, **kwargs)
    checkpoint.save_file = save_some
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
    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("hmoe.conversion.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        convert_moe(mixtral, tmp_path / "hmoe", QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixtral"]


def test_failed_check_leaves_nothing(tmp_path, mixtral, monkeypatch):
    monkeypatch.setattr(CheckResult, "passed", False)
    with pytest.raises(CheckFailed, match="largest logit difference"):
        convert_moe(mixtral, tmp_path / "hmoe", QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixtral"]


def test_wrong_weights_fail_the_check(tmp_path, mixtral, monkeypatch):
    def spoil(tensors, path, **kwargs):
        tensors["model.layers.1.mlp.experts.down_proj"] *= 1.01
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr("hmoe.conversion.checkpoint.save_file", spoil)
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
