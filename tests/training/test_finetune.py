"""LoRA on a model trained here, from the first adapter to the merged checkpoint, on real text."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_training import tiny_arguments
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, default_data_collator

from hmoe import HMoEConfig, HMoEForCausalLM, lora_config
from hmoe.training.trainer import HMoETrainer


TEXT = Path(__file__).parents[2] / "examples" / "data" / "state_of_the_union.txt"
LENGTH = 64


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def rows_of(text: str, tokenizer: PreTrainedTokenizerFast, limit: int) -> Dataset:
    ids = tokenizer(text, verbose=False)["input_ids"][: limit * LENGTH]
    rows = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH + 1, LENGTH)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def make_trainer(folder: Path, model, train: Dataset, evaluation: Dataset, **arguments) -> HMoETrainer:
    fields = {"per_device_train_batch_size": 8, "learning_rate": 5e-3, "lr_scheduler_type": "constant"}
    return HMoETrainer(
        model=model,
        args=tiny_arguments(folder, **{**fields, **arguments}),
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=default_data_collator,
    )


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A checkpoint trained for some steps on two speeches, its tokenizer, and rows of a third to tune on."""
    folder = tmp_path_factory.mktemp("base")
    speeches = re.split(r"(?m)^=== \S+ ===\n", TEXT.read_text(encoding="utf-8"))[1:]
    old, new = speeches[0] + speeches[1], speeches[-1]
    tokenizer = make_tokenizer(old)
    torch.manual_seed(0)
    config = HMoEConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        expert_intermediate_sizes=[16, 32, 48, 64],
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    trainer = make_trainer(
        folder / "run",
        HMoEForCausalLM(config),
        rows_of(old, tokenizer, 400),
        rows_of(new, tokenizer, 12),
        max_steps=60,
        learning_rate=1e-2,
    )
    trainer.train()
    trainer.processing_class = tokenizer
    trainer.save_model(str(folder / "model"))
    return folder / "model", rows_of(new, tokenizer, 12)


@pytest.fixture(scope="module")
def tuned(pretrained, tmp_path_factory):
    """The trainer of a LoRA run over a handful of rows, and its folder with the adapter."""
    base, examples = pretrained
    folder = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora_config(r=4, router=True))
    saves = {"save_strategy": "steps", "save_steps": 5, "logging_steps": 5}
    trainer = make_trainer(folder, model, examples, examples, max_steps=15, learning_rate=2e-2, **saves)
    trainer.perplexity_before = trainer.evaluate()["eval_perplexity"]
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    return trainer, folder


def test_adapters_on_attention_experts_and_router_learn_a_handful_of_examples(tuned):
    trainer, _ = tuned
    (after,) = (entry["eval_perplexity"] for entry in trainer.state.log_history if "eval_perplexity" in entry)
    assert after < 0.8 * trainer.perplexity_before
    adapters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in adapters)
    for part in ("self_attn.q_proj", "mlp.experts", "mlp.gate"):
        moved = [p for name, p in adapters.items() if part in name and "lora_B" in name]
        assert moved and all(p.abs().sum() > 0 for p in moved), part


def test_router_metrics_are_logged_through_the_adapters(tuned):
    trainer, _ = tuned
    logs = [entry for entry in trainer.state.log_history if "lm_loss" in entry]
    assert len(logs) == 3
    assert all(entry["experts_per_token"] == pytest.approx(2) and entry["train_flops"] > 0 for entry in logs)


def test_a_lora_run_resumes_to_the_same_adapter(tuned, pretrained, tmp_path):
    trainer, folder = tuned
    base, examples = pretrained
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora_config(r=4, router=True))
    again = make_trainer(tmp_path, model, examples, examples, max_steps=15, learning_rate=2e-2)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-10"))
    expected = {name: p for name, p in trainer.model.state_dict().items() if "lora_" in name}
    found = again.model.state_dict()
    assert all(torch.equal(p, found[name]) for name, p in expected.items())


def test_saved_adapter_loads_on_the_base_and_merges_to_the_same_model(tuned, pretrained, tmp_path):
    trainer, folder = tuned
    base, examples = pretrained
    batch = torch.tensor(examples["input_ids"][:4])
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=batch).logits
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
        torch.testing.assert_close(loaded(input_ids=batch).logits, expected)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=batch).logits, expected, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        assert set(load_file(tmp_path / "merged" / "model.safetensors")) == set(load_file(base / "model.safetensors"))
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(reloaded(input_ids=batch).logits, expected, rtol=1e-4, atol=1e-4)
    evaluated = make_trainer(tmp_path / "evaluation", reloaded, examples, examples).evaluate()
    assert evaluated["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-4)


def test_card_of_an_adapter_says_how_to_load_it_on_its_base(tuned, pretrained):
    _, folder = tuned
    card = (folder / "README.md").read_text()
    assert "PeftModel.from_pretrained" in card and "LoRA adapter" in card and "library_name: peft" in card
    assert f'"{pretrained[0].name}"' in card and str(pretrained[0]) not in card
