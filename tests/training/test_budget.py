"""Training budgets in tokens and FLOPs: where a run stops, what it counts, and what a resumed run goes on counting."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hmoe import HMoEConfig, HMoEForCausalLM
from hmoe.costs import model_costs
from hmoe.training.arguments import HMoETrainingArguments
from hmoe.training.budget import BudgetCallback, steps_for_budget
from hmoe.training.trainer import HMoETrainer


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
LENGTH = 16


def hmoe(**overrides) -> HMoEForCausalLM:
    torch.manual_seed(0)
    fields = {
        **SMALL,
        "expert_intermediate_sizes": [[8, 16, 24, 40], [16, 8, 8]],
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return HMoEForCausalLM(HMoEConfig(**{**fields, **overrides}))


def rows(number: int) -> list[dict]:
    torch.manual_seed(1)
    ids = torch.randint(0, 64, (number, LENGTH))
    return [{"input_ids": row, "labels": row} for row in ids]


def train(tmp_path, model, *, resume=None, **settings) -> HMoETrainer:
    fields = {"save_strategy": "no", **settings}
    args = HMoETrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, use_cpu=True, report_to="none", disable_tqdm=True, **fields
    )
    trainer = HMoETrainer(model, args, train_dataset=rows(64), eval_dataset=rows(2))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def budget_of(trainer: HMoETrainer) -> BudgetCallback:
    (budget,) = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, BudgetCallback)]
    return budget


@pytest.mark.parametrize("router_metrics", ["brief", "off"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_and_evaluation_do_not_count(reentrant, router_metrics, tmp_path):
    settings = {"max_steps": 2, "max_train_flops": 1e18, "router_metrics": router_metrics}
    plain = train(tmp_path / "plain", hmoe(), **settings)
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    evaluation = {"eval_strategy": "steps", "eval_steps": 1}
    again = train(tmp_path / "again", hmoe(), **settings, **checkpointing, **evaluation)
    assert budget_of(again).flops == budget_of(plain).flops > 0
    assert budget_of(again).tokens == budget_of(plain).tokens == 2 * 2 * LENGTH


@pytest.mark.parametrize("router_metrics", ["brief", "off"])
def test_a_run_stops_at_the_first_step_that_reaches_the_flops_budget(router_metrics, tmp_path):
    free = train(tmp_path / "free", hmoe(), max_steps=4)
    spent = free.state.total_flos
    settings = {"max_steps": 20, "router_metrics": router_metrics}
    trainer = train(tmp_path / "budget", hmoe(), max_train_flops=spent, **settings)
    assert trainer.state.global_step == 4
    assert budget_of(trainer).flops == spent
    trainer = train(tmp_path / "more", hmoe(), max_train_flops=spent + 1, **settings)
    assert trainer.state.global_step == 5


def test_the_budget_and_the_log_count_the_same_flops_and_a_resumed_run_goes_on_counting(tmp_path):
    settings = {"max_steps": 6, "max_train_flops": 1e18}
    whole = train(tmp_path / "whole", hmoe(), save_strategy="steps", save_steps=3, **settings)
    resumed = train(tmp_path / "resumed", hmoe(), resume=str(tmp_path / "whole" / "checkpoint-3"), **settings)
    counts = [(budget_of(trainer).tokens, budget_of(trainer).flops) for trainer in (whole, resumed)]
    assert counts[0] == counts[1] == (6 * 2 * LENGTH, whole.state.total_flos)
    assert resumed.state.total_flos == whole.state.total_flos


def test_a_token_budget_stops_and_saves(tmp_path):
    settings = {"max_steps": 20, "save_strategy": "steps", "save_steps": 100}
    trainer = train(tmp_path, hmoe(), max_train_tokens=5 * 2 * LENGTH - 1, **settings)
    assert trainer.state.global_step == 5
    assert (tmp_path / "checkpoint-5").is_dir()


def test_a_budget_counts_batches_whose_labels_the_trainer_took_out(tmp_path):
    """`Trainer` computes the smoothed loss of a stock model itself."""
    settings = {"max_steps": 20, "label_smoothing_factor": 0.1}
    trainer = train(
        tmp_path,
        LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=48)),
        max_train_tokens=5 * 2 * LENGTH,
        **settings,
    )
    assert trainer.state.global_step == 5


def test_planned_steps_cover_the_budget(tmp_path):
    flops = model_costs(hmoe()).forward_flops()

    def steps(**budgets) -> int:
        args = HMoETrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, use_cpu=True, lr_scheduler_type="constant", **budgets
        )
        return steps_for_budget(args, flops, LENGTH)

    assert steps() == -1
    assert steps(max_train_tokens=65) == 3
    assert steps(max_steps=2, max_train_tokens=65) == 2
    least = 3 * flops.least(32, LENGTH)
    assert steps(max_train_flops=10 * least) == 10
    assert least < 3 * flops.count(32, LENGTH)
