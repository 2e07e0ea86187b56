"""A model of a few thousand parameters and data for it, shared by the tests of training."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainingArguments, default_data_collator

from hmoe import HMoEConfig, HMoEForCausalLM
from hmoe.training.arguments import HMoETrainingArguments
from hmoe.training.trainer import HMoETrainer


VOCABULARY = 64
LENGTH = 16
SIZES = [8, 16, 24, 32]


def tiny_config(**overrides: Any) -> HMoEConfig:
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "expert_intermediate_sizes": SIZES,
        "attention_dropout": 0.1,
        "load_balancing_loss_coef": 0.01,
        "parameter_penalty_loss_coef": 0.1,
        "router_entropy_loss_coef": 0.03,
        "router_z_loss_coef": 0.001,
        "pad_token_id": 0,
    }
    return HMoEConfig(**{**fields, **overrides})


def tiny_model(seed: int = 0, **overrides: Any) -> HMoEForCausalLM:
    torch.manual_seed(seed)
    return HMoEForCausalLM(tiny_config(**overrides))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, 64)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def tiny_data(rows: int = 48, seed: int = 0) -> Dataset:
    """Sequences that count upwards in steps of 1 to 3: learnable."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(3, VOCABULARY, (rows, 1), generator=generator)
    step = torch.randint(1, 4, (rows, 1), generator=generator)
    ids = 3 + (start + step * torch.arange(LENGTH)) % (VOCABULARY - 3)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def padded_data(rows: int = 24) -> Dataset:
    """Rows of different length, padded on the right; labels of padding are -100."""
    data: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": []}
    for number, row in enumerate(tiny_data(rows)["input_ids"]):
        kept = 4 + (5 * number) % (LENGTH - 3)
        data["input_ids"].append(row[:kept] + [0] * (LENGTH - kept))
        data["attention_mask"].append([1] * kept + [0] * (LENGTH - kept))
        data["labels"].append(row[:kept] + [-100] * (LENGTH - kept))
    return Dataset.from_dict(data)


def tiny_arguments(folder: Any, **overrides: Any) -> TrainingArguments:
    """Plain `TrainingArguments`, unless a field of `HMoETrainingArguments` is among the overrides."""
    fields = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    plain = TrainingArguments.__dataclass_fields__.keys() >= overrides.keys()
    return (TrainingArguments if plain else HMoETrainingArguments)(**{**fields, **overrides})


def tiny_trainer(folder: Any, model: Any = None, data: Any = None, **overrides: Any) -> HMoETrainer:
    return HMoETrainer(
        model=tiny_model() if model is None else model,
        args=tiny_arguments(folder, **overrides),
        train_dataset=tiny_data() if data is None else data,
        eval_dataset=tiny_data(8, seed=1),
        data_collator=default_data_collator,
    )
