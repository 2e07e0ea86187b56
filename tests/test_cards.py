"""The model card of runs and conversions: what it says, what it keeps to itself, and what the Hub reads of it."""

import yaml
from transformers import LlamaConfig

from hmoe.cards import public, write_card


def split(path) -> tuple[dict, str]:
    _, metadata, text = path.read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_a_conversion_says_how_it_was_made(tmp_path, tiny_config):
    info = {
        "base_model": "owner/source",
        "command": ["convert", "moe", "a folder", "out"],
        "settings": {"conversion": "moe", "dtype": None},
        "notes": ["padded to 8 neurons"],
        "check": "identity check on 3 tokens",
    }
    metadata, text = split(write_card(tmp_path, "made", tiny_config(), info))
    assert metadata["base_model"] == ["owner/source"]
    assert "converted from `owner/source`" in text and "licence and terms of `owner/source`" in text
    assert "hmoe convert moe 'a folder' out\n" in text and '"dtype": null' in text
    assert "- padded to 8 neurons\n\nCheck: identity check on 3 tokens\n" in text
    assert '"made", trust_remote_code=True' in text and "## Training" not in text
    assert "none was made" in write_card(tmp_path, "made", tiny_config(), {**info, "check": None}).read_text()


def test_layers_of_equal_sizes_are_one_row_unless_their_load_differs(tmp_path, tiny_config):
    config = tiny_config(num_hidden_layers=3, expert_intermediate_sizes=[[8, 16], [8, 16], [24, 8]])
    _, text = split(write_card(tmp_path, "model", config, {}))
    assert "| 0-1 | 8, 16 |\n| 2 | 24, 8 |" in text
    load = [[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]]
    _, text = split(write_card(tmp_path, "model", config, {"load": load}))
    assert "| 0 | 8, 16 | 25.0, 75.0 |\n| 1 | 8, 16 | 50.0, 50.0 |\n| 2 | 24, 8 | 100.0, 0.0 |" in text


def test_the_hub_gets_evaluation_data_sets_and_base_model_by_its_own_names(tmp_path):
    info = {"evaluation": {"eval_loss": 2.0, "piqa": {"acc": 0.5}}, "datasets": ["owner/data"], "license": "mit"}
    (tmp_path / "base").mkdir()
    info |= {"base_model": str(tmp_path / "base"), "num_parameters": 12345, "tags": ["small"], "language": "en"}
    metadata, text = split(write_card(tmp_path, "owner/model", LlamaConfig(), info))
    assert "base_model" not in metadata and "continued from `base`" in text
    (result,) = metadata["model-index"][0]["results"]
    assert (result["dataset"]["type"], result["metrics"]) == ("piqa", [{"type": "acc", "value": 0.5}])
    assert (metadata["license"], metadata["language"], metadata["datasets"]) == ("mit", "en", ["owner/data"])
    assert metadata["tags"] == ["llama", "small"]
    assert "| total | 12,345 |" in text and "| piqa | acc | 0.5000 |" in text and "# model\n" in text


def test_folders_and_tokens_of_the_machine_stay_out(tmp_path, tiny_config):
    secret = str(tmp_path / "secret")
    info = {
        "base_model": f"{secret}/source",
        "command": ["convert", f"{secret}/source", f"--check_text={secret}/words.txt", "~/out"],
        "settings": {"source": tmp_path / "secret" / "source", "hub_token": "hf_token"},
        "data": f"{secret}/texts.jsonl",
    }
    text = write_card(tmp_path, "model", tiny_config(), info).read_text()
    assert "secret" not in text and "hf_token" not in text and "~" not in text
    assert "--check_text=words.txt out" in text and "- texts.jsonl" in text


def test_public_values_keep_what_names_no_folder():
    value = {"sizes": [8, 16], "path": "runs/model", "name": "owner/name", "rate": 0.5, "token": "x", "here": None}
    assert public(value) == {"sizes": [8, 16], "path": "runs/model", "name": "owner/name", "rate": 0.5, "here": None}
