"""Small models of every kind, saved with a tokenizer trained on the repository's sample text, and tasks of lm_eval."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hmoe import HMoEConfig, HMoEForCausalLM


SAMPLE = Path(__file__).parents[2] / "examples" / "data" / "state_of_the_union.txt"
VOCABULARY = 512
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.3,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "hmoe": lambda: HMoEForCausalLM(HMoEConfig(**COMMON, expert_intermediate_sizes=[24, 8, 32, 16])),
    "top_p": lambda: HMoEForCausalLM(
        HMoEConfig(**COMMON, expert_intermediate_sizes=[[8, 16, 24, 32], [40, 8, 16]], routing="top_p")
    ),
    "twin": lambda: HMoEForCausalLM(HMoEConfig(**COMMON, expert_intermediate_sizes=[20] * 4)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**COMMON, intermediate_size=20, num_local_experts=4)),
    "olmoe": lambda: OlmoeForCausalLM(
        OlmoeConfig(**COMMON, intermediate_size=12, num_experts=6, num_experts_per_tok=3)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, intermediate_size=40)),
}
DOCUMENTS = [
    {"question": "The state of the Union is", "answers": ["strong", "a fish", "blue and green"], "label": 0},
    {"question": "We the people", "answers": ["of the United States", "!", "are"], "label": 0},
    {"question": "Congress", "answers": ["shall make no law", "is", "sleeps in the long grass"], "label": 1},
    {"question": "My fellow", "answers": ["Americans", "tables", "of course, and so on"], "label": 0},
]


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **special)


@pytest.fixture(scope="session")
def sample_text() -> str:
    return SAMPLE.read_text(encoding="utf-8")[:60_000]


@pytest.fixture(scope="session")
def tokenizer(sample_text) -> PreTrainedTokenizerFast:
    return train_tokenizer(sample_text)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer) -> Callable[[str], str]:
    """`model_folder(name)` saves a model of `MODELS` once and returns its folder."""
    root = tmp_path_factory.mktemp("models")

    def make(name: str) -> str:
        folder = root / name
        if not folder.exists():
            torch.manual_seed(len(name))
            MODELS[name]().save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture
def own_tasks_only(monkeypatch):
    """lm_eval reads thousands of YAMLs at every start, which takes it seconds; these tests need none of them."""
    import lm_eval.tasks
    from lm_eval.tasks._index import TaskIndex

    packaged, read = Path(lm_eval.tasks.__file__).parent, TaskIndex._iter_yaml_files
    monkeypatch.setattr(
        TaskIndex, "_iter_yaml_files", staticmethod(lambda root: iter(()) if root == packaged else read(root))
    )


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Two small tasks with items of their own: `toy_choice` (scored options) and `toy_text` (generated answers)."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "items.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "num_fewshot": 0,
    }
    choice = {
        "task": "toy_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    text = {
        "task": "toy_text",
        "output_type": "generate_until",
        "doc_to_target": "{{answers[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (choice, text, {**choice, "task": "local_choice"}):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**common, **task}))
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory, sample_text) -> Path:
    path = tmp_path_factory.mktemp("text") / "speech.txt"
    path.write_text(sample_text, encoding="utf-8")
    return path
