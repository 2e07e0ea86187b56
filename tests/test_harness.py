"""lm_eval runs a saved HMoE by its own code, offline, where `hmoe` is not installed."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from without_hmoe import run_without_hmoe

from hmoe import HMoEForCausalLM


WORDS = ["<pad>", "<s>", "</s>", "<unk>", "one", "two", "three", "four", "left", "right", "up", "down"]
ITEMS = [
    {"question": "one two", "choices": ["left", "right"], "answer": 0},
    {"question": "two three", "choices": ["left", "right up"], "answer": 1},
    {"question": "three four", "choices": ["up", "down"], "answer": 1},
    {"question": "four one two", "choices": ["up left", "down"], "answer": 0},
]
LM_EVAL = """
from lm_eval.__main__ import cli_evaluate

cli_evaluate()
"""


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def toy_task(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    items = folder / "items.jsonl"
    items.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    task = {
        "task": "toy",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(items)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(task))
    return folder


@torch.no_grad()
def log_likelihoods(item: dict, model: HMoEForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[float]:
    """Of each choice after the question, one forward per choice."""
    context = tokenizer(item["question"])["input_ids"]
    scores = []
    for choice in item["choices"]:
        continuation = tokenizer(choice)["input_ids"]
        logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
        scores.append(logits.log_softmax(-1).gather(1, torch.tensor([continuation]).t()).sum().item())
    return scores


def test_lm_eval_gives_the_log_likelihoods_of_the_packages_own_model(tiny_config, tokenizer, toy_task, tmp_path):
    model = HMoEForCausalLM(tiny_config(initializer_range=0.5)).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run_without_hmoe(
        LM_EVAL,
        *("--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'},trust_remote_code=True"),
        *("--include_path", toy_task, "--tasks", "toy", "--device", "cpu", "--batch_size", "2"),
        *("--output_path", tmp_path / "results", "--log_samples"),
        home=tmp_path / "home",
    )
    (samples,) = (tmp_path / "results").rglob("samples_toy_*.jsonl")
    answers = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [answer["doc"] for answer in answers] == ITEMS
    for answer in answers:
        scores = [float(score) for score, _ in answer["filtered_resps"]]
        expected = log_likelihoods(answer["doc"], model, tokenizer)
        assert scores == pytest.approx(expected, abs=1e-4)
        assert answer["acc"] == (expected.index(max(expected)) == answer["doc"]["answer"])
