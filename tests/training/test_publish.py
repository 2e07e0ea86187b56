import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.rounding import step_rounding
from local_hub import TOKEN, USER, local_hub
from safetensors.torch import load_file
from tiny_training import tiny_arguments, tiny_data, tiny_model, tiny_tokenizer, tiny_trainer
from transformers import LlamaConfig, LlamaForCausalLM

from hmoe import count_parameters
from hmoe.training.publish import write_model_card


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A trainer that has trained and evaluated, and its folder."""
    folder = tmp_path_factory.mktemp("published") / "counting-hmoe"
    trainer = tiny_trainer(folder, max_steps=2)
    trainer.processing_class = tiny_tokenizer()
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.card_info = {
        "recipe": {"learning_rate": 0.01, "dataset": ["/home/someone/secret/texts.jsonl"], "hub_token": "hf_secret"},
        "data": ["numbers that count upwards", "/home/someone/secret/texts.jsonl"],
        "license": "apache-2.0",
    }
    trainer.create_model_card()
    return trainer, folder


def test_final_folder_carries_weights_tokenizer_code_and_card(finished):
    _, folder = finished
    names = {path.name for path in folder.iterdir()}
    code = {f"{name}_hmoe.py" for name in ("modeling", "configuration", "experts", "grouped", "plan", "routing")}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "metrics.jsonl"} | code <= names


def test_card_states_sizes_parameters_routing_losses_evaluation_and_both_papers(finished):
    trainer, folder = finished
    card = (folder / "README.md").read_text()
    counts = count_parameters(trainer.model.config, load=trainer.router_window.load())
    assert f"{counts.total:,}" in card and f"{counts.activated:,.0f}" in card
    for expert, size in enumerate(trainer.model.config.expert_intermediate_sizes):
        assert f"| {expert} | {size} | {counts.experts[0][expert]:,} |" in card
    assert "Top-2" in card and "parameter penalty loss, coefficient 0.1" in card
    logs = trainer.state.log_history
    assert f"| last lm loss | {logs[1]['lm_loss']:.4f} |" in card
    (perplexity,) = (entry["eval_perplexity"] for entry in logs if "eval_perplexity" in entry)
    assert f"| validation | perplexity | {perplexity:.4f} |" in card
    assert "2408.10681" in card and "2409.12210" in card and "trust_remote_code=True" in card


def test_card_metadata_is_what_the_hub_reads(finished):
    _, folder = finished
    _, metadata, _ = (folder / "README.md").read_text().split("---\n", 2)
    data = yaml.safe_load(metadata)
    assert data["library_name"] == "transformers" and data["license"] == "apache-2.0"
    assert {"hmoe", "mixture-of-experts"} <= set(data["tags"])
    (metric,) = data["model-index"][0]["results"][0]["metrics"]
    assert metric["type"] == "perplexity"


def test_card_keeps_folders_and_tokens_of_the_machine_to_itself(finished):
    _, folder = finished
    card = (folder / "README.md").read_text()
    assert "texts.jsonl" in card
    assert "someone" not in card and "hf_secret" not in card and str(folder.parent) not in card


def test_card_of_layers_that_differ_of_top_p_and_of_a_dense_twin(tmp_path):
    model = tiny_model(expert_intermediate_sizes=[[8, 16], [24, 32, 40]], routing="top_p", max_experts_per_tok=2)
    text = write_model_card(model, tiny_arguments(tmp_path), tmp_path, {}).read_text()
    assert "| 1 | 24, 32, 40 |" in text and "Top-P, p = 0.6, at most 2" in text and "depends on the token" in text
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    text = write_model_card(dense, tiny_arguments(tmp_path), tmp_path, {}).read_text()
    assert "trust_remote_code" not in text and "mixture-of-experts" not in text


PUSH = """
import sys
sys.path[:0] = [sys.argv[1], f"{sys.argv[1]}/.."]
from tiny_training import tiny_tokenizer, tiny_trainer
from hmoe.training.publish import push_folder

arguments = {"push_to_hub": True, "hub_model_id": "counting", "save_strategy": "steps", "save_steps": 1, "seed": 3}
trainer = tiny_trainer(sys.argv[2], max_steps=2, **arguments)
trainer.processing_class = tiny_tokenizer()
trainer.train()
print("COMMIT", trainer.push_to_hub())
print("COMMIT", push_folder(sys.argv[2], "second", private=True))
"""

LOAD = """
import json, sys, torch


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hmoe":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NotInstalled())
from transformers import AutoModelForCausalLM, AutoTokenizer

name, ids = sys.argv[1], torch.tensor([json.loads(sys.argv[2])])
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
assert not any(module.partition(".")[0] == "hmoe" for module in sys.modules)
with torch.no_grad():
    loss = model(input_ids=ids, labels=ids).loss.item()
print("RESULT", json.dumps([type(model).__name__, loss, tokenizer("w5 w6")["input_ids"]]))
"""


def run_python(code: str, *args: str | Path, environment: dict[str, str]) -> str:
    cleared = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env={**cleared, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


def test_pushed_through_the_hub_client_and_loaded_back_by_name_without_hmoe(tmp_path):
    folder = tmp_path / "run"
    with local_hub() as hub:
        client = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        here = Path(__file__).parent
        pushed = run_python(PUSH, here, folder, environment={**client, "HF_TOKEN": TOKEN})
        repository = hub.repositories[f"{USER}/counting"]
        assert hub.unknown == []
        assert f"/commit/{repository.commits[-1]}" in pushed
        row = tiny_data(1)["input_ids"][0]
        loaded = run_python(
            LOAD, f"{USER}/counting", json.dumps(row), environment={**client, "HF_HOME": str(tmp_path / "b")}
        )
        private = hub.repositories[f"{USER}/second"]
    name, loss, ids = json.loads(loaded.split("RESULT ")[1])
    model = tiny_model()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    with torch.no_grad():
        batch = torch.tensor([row])
        expected = model.eval()(input_ids=batch, labels=batch).loss.item()
    assert (name, ids) == ("HMoEForCausalLM", [5, 6])
    # The other process may use another number of threads.
    assert loss == pytest.approx(expected, rel=step_rounding(model.config, len(row), len(row)))
    assert {"model.safetensors", "tokenizer.json", "README.md", "modeling_hmoe.py"} <= set(repository.files)
    assert "model.safetensors" in repository.large
    assert not any(name.startswith(("checkpoint-", "tmp-")) for name in {**repository.files, **private.files})
    assert private.private and private.files["model.safetensors"] == repository.files["model.safetensors"]
    assert b"counting" in repository.files["README.md"]
