"""Small models of every kind, saved with a tokenizer trained on the repository's sample text."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
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
