"""TRL's `SFTTrainer`, which computes the loss of any MoE model by itself, gets this model's router losses."""

import pytest
import torch
from datasets import Dataset
from tiny_training import padded_data, tiny_model, tiny_tokenizer
from transformers import MixtralConfig, MixtralForCausalLM

from hmoe import lora_config


trl = pytest.importorskip("trl")


def texts(rows=8):
    """Sentences of different lengths."""
    data = padded_data(rows)
    kept = [[token for token in row if token] for row in data["input_ids"]]
    return Dataset.from_dict({"text": [" ".join(f"w{token}" for token in row) for row in kept]})


def sft_trainer(folder, model, **kwargs):
    accumulation = kwargs.pop("gradient_accumulation_steps", 1)
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        learning_rate=1e-3,
    )
    return trl.SFTTrainer(
        model=model, args=arguments, train_dataset=texts(), processing_class=tiny_tokenizer(), **kwargs
    )


def batch_of(trainer):
    return next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize(
    "fields",
    [{}, {"routing": "top_p"}, {"expert_intermediate_sizes": [[8, 16, 24], [16, 32]]}, {"router_aux_loss_coef": 0.5}],
    ids=["top_k", "top_p", "layers that differ", "scaled"],
)
def test_logged_aux_loss_and_trained_loss_are_the_models_own(tmp_path, fields):
    model = tiny_model(attention_dropout=0.0, **fields)
    twin = tiny_model(attention_dropout=0.0, **fields).train()
    trainer = sft_trainer(tmp_path, model)
    batch = batch_of(trainer)
    with torch.no_grad():
        expected = twin(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["aux_loss"] == pytest.approx(expected.aux_loss.item(), rel=1e-5)
    assert log["loss"] == pytest.approx(expected.loss.item(), rel=1e-5)


def test_the_router_gets_the_gradient_of_its_own_losses(tmp_path):
    model, twin = tiny_model(attention_dropout=0.0), tiny_model(attention_dropout=0.0)
    trainer = sft_trainer(tmp_path, model)
    batch = {name: value for name, value in batch_of(trainer).items() if name != "position_ids"}
    trainer.compute_loss(model.train(), dict(batch)).backward()
    twin.train()(**batch).loss.backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_accumulation_does_not_change_the_size_of_the_aux_loss(tmp_path):
    logs = []
    for accumulation in (1, 4):
        trainer = sft_trainer(tmp_path, tiny_model(attention_dropout=0.0), gradient_accumulation_steps=accumulation)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    # Products of means over smaller batches: close, not equal.
    assert logs[1]["aux_loss"] == pytest.approx(logs[0]["aux_loss"], rel=0.1)
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], rel=0.02)


def test_lora_through_sft_trainer_logs_the_same_aux_loss(tmp_path):
    full = sft_trainer(tmp_path, tiny_model(attention_dropout=0.0))
    full.train()
    adapted = sft_trainer(tmp_path, tiny_model(attention_dropout=0.0), peft_config=lora_config(r=2))
    adapted.train()
    # The adapters start at zero, so the first batch sees the same model.
    assert adapted.state.log_history[0]["aux_loss"] == pytest.approx(full.state.log_history[0]["aux_loss"], rel=1e-5)


def test_other_models_keep_their_own_loss(tmp_path):
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        router_aux_loss_coef=0.02,
    )
    model = MixtralForCausalLM(config)
    trainer = sft_trainer(tmp_path, model)
    batch = batch_of(trainer)
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
    trainer.train()
    assert trainer.state.log_history[0]["aux_loss"] == pytest.approx(expected.aux_loss.item(), rel=1e-5)
