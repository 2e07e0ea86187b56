"""Plain `Trainer`: gradients do not depend on how a batch is split, evaluation is pure cross-entropy, runs resume."""

import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.rounding import step_rounding
from transformers import Trainer, TrainerCallback, TrainingArguments

from hmoe import HMoEConfig, HMoEForCausalLM


ALL_LOSSES = {
    "load_balancing_loss_coef": 0.5,
    "parameter_penalty_loss_coef": 0.4,
    "router_entropy_loss_coef": 0.3,
    "router_z_loss_coef": 0.2,
}
NO_LOSSES = dict.fromkeys(ALL_LOSSES, 0.0)
NUM_ROWS, LENGTH = 8, 12
SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]  # rows per micro-batch, accumulation steps
RANK_SPLITS = [(4, 1), (2, 2), (1, 4)]  # the same batch on two ranks

Row = dict[str, list[int]]
Gradients = dict[str, torch.Tensor]


def tokens(seed: int, length: int = LENGTH) -> list[int]:
    return torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def row(ids: list[int], num_ignored: int = 1) -> Row:
    return {"input_ids": ids, "labels": [-100] * num_ignored + ids[num_ignored:], "attention_mask": [1] * len(ids)}


IDENTICAL = [row(tokens(0))] * NUM_ROWS
DIFFERENT = [row(tokens(seed)) for seed in range(NUM_ROWS)]
DIFFERENT_LABEL_COUNTS = [row(tokens(seed), num_ignored=1 + seed) for seed in range(NUM_ROWS)]


def padded(rows: list[Row], side: str, amount: int = 5) -> list[Row]:
    pad = {"input_ids": [0] * amount, "labels": [-100] * amount, "attention_mask": [0] * amount}
    join = (lambda name, values: pad[name] + values) if side == "left" else (lambda name, values: values + pad[name])
    return [{name: join(name, values) for name, values in row.items()} for row in rows]


# The shares of tokens and of labels differ from row to row, and so from rank to rank.
UNEVEN = [
    padded([row(tokens(seed, LENGTH - seed), num_ignored=1 + seed % 3)], "right", seed)[0] for seed in range(NUM_ROWS)
]


@dataclass(frozen=True)
class Step:
    """One optimizer step of `Trainer` on `rows`, from the weights and config in a folder."""

    rows: list[Row]
    split: tuple[int, int] = (NUM_ROWS, 1)
    config: dict = field(default_factory=lambda: ALL_LOSSES)
    arguments: dict = field(default_factory=dict)


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {
            name.removeprefix("module."): parameter.grad.clone() for name, parameter in model.named_parameters()
        }


def trainer_arguments(folder: Path, **arguments) -> TrainingArguments:
    fixed = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_grad_norm": 0.0}
    return TrainingArguments(output_dir=str(folder), **{**fixed, "save_strategy": "no", **arguments})


def gradients(folder: Path, step: Step) -> Gradients:
    keep = KeepGradients()
    Trainer(
        HMoEForCausalLM.from_pretrained(folder, **step.config),
        trainer_arguments(
            folder / "runs",
            max_steps=1,
            per_device_train_batch_size=step.split[0],
            gradient_accumulation_steps=step.split[1],
            **step.arguments,
        ),
        train_dataset=step.rows,
        callbacks=[keep],
    ).train()
    return keep.gradients


def _run_rank(rank: int, port: int, folder: Path, steps: dict[str, Step], answers: Path) -> None:
    """What `torchrun --nproc-per-node 2` runs: the gradients of every step, written by rank 0."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    results = {name: gradients(folder, step) for name, step in steps.items()}
    if rank == 0:
        torch.save(results, answers)
    torch.distributed.destroy_process_group()


STEPS_ON_TWO_RANKS = {
    **{f"identical-{split}": Step(IDENTICAL, split) for split in RANK_SPLITS},
    **{f"labels-{split}": Step(DIFFERENT_LABEL_COUNTS, split, NO_LOSSES) for split in RANK_SPLITS},
    "own_average": Step(IDENTICAL, (2, 2), arguments={"average_tokens_across_devices": False}),
    "micro_batch": Step(DIFFERENT, (4, 1), {**ALL_LOSSES, "router_loss_scope": "micro_batch"}),
    "global_batch": Step(DIFFERENT, (4, 1), {**ALL_LOSSES, "router_loss_scope": "global_batch"}),
    "global_batch-top1": Step(
        DIFFERENT, (4, 1), {**ALL_LOSSES, "router_loss_scope": "global_batch", "load_balancing_counts": "top1"}
    ),
    "global_batch-uneven": Step(UNEVEN, (4, 1), {**ALL_LOSSES, "router_loss_scope": "global_batch"}),
    "global_batch-padded": Step(
        padded(DIFFERENT, "right"), (4, 1), {**ALL_LOSSES, "router_loss_scope": "global_batch"}
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_config: Callable[..., HMoEConfig]) -> Path:
    """A checkpoint whose router prefers some experts, so that router losses have something to say."""
    path = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    HMoEForCausalLM(tiny_config(initializer_range=0.2, pad_token_id=0)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def on_two_ranks(folder, tmp_path_factory) -> dict[str, Gradients]:
    answers = tmp_path_factory.mktemp("ranks") / "gradients.pt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    ranks = [
        spawn.Process(target=_run_rank, args=(rank, port, folder, STEPS_ON_TWO_RANKS, answers)) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
    for process in ranks:
        process.kill()  # a rank that waits for one that failed
    assert [process.exitcode for process in ranks] == [0, 0]
    return torch.load(answers)


def differences(left: Gradients, right: Gradients) -> dict[str, float]:
    """Per parameter, the largest difference relative to the largest gradient."""
    assert left.keys() == right.keys()
    return {name: ((left[name] - right[name]).abs().max() / right[name].abs().max()).item() for name in left}


def assert_same_gradients(left: Gradients, right: Gradients) -> None:
    assert max(differences(left, right).values()) < 2e-5, differences(left, right)


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, Gradients]:
    """Of the whole batch at once in one process."""
    return {
        "identical": gradients(folder, Step(IDENTICAL)),
        "labels": gradients(folder, Step(DIFFERENT_LABEL_COUNTS, config=NO_LOSSES)),
        "different": gradients(folder, Step(DIFFERENT)),
    }


def test_router_losses_reach_the_router(folder, expected):
    # Without this the comparisons below would hold for router losses that do nothing.
    without = gradients(folder, Step(IDENTICAL, config=NO_LOSSES))
    routers = [name for name in without if ".mlp.gate." in name]
    assert routers
    assert all(differences(expected["identical"], without)[name] > 0.1 for name in routers)


# Identical rows: router losses are not linear in the batch, so only equal micro-batches have equal statistics.
@pytest.mark.parametrize("split", SPLITS[1:], ids=str)
def test_gradient_accumulation_does_not_change_the_gradient(folder, expected, split):
    assert_same_gradients(gradients(folder, Step(IDENTICAL, split)), expected["identical"])


@pytest.mark.parametrize("split", SPLITS[1:], ids=str)
def test_rows_with_different_label_counts_weigh_the_same_in_every_split(folder, expected, split):
    step = Step(DIFFERENT_LABEL_COUNTS, split, NO_LOSSES)
    assert_same_gradients(gradients(folder, step), expected["labels"])


@pytest.mark.parametrize("split", RANK_SPLITS, ids=str)
def test_two_ranks_give_the_gradient_of_one(on_two_ranks, expected, split):
    assert_same_gradients(on_two_ranks[f"identical-{split}"], expected["identical"])
    assert_same_gradients(on_two_ranks[f"labels-{split}"], expected["labels"])


def test_ranks_that_count_labels_for_themselves_give_the_gradient_of_one(on_two_ranks, expected):
    assert_same_gradients(on_two_ranks["own_average"], expected["identical"])


@pytest.mark.parametrize("top1", [False, True], ids=["activated", "top1"])
def test_global_batch_scope_on_two_ranks_equals_the_concatenated_batch(folder, on_two_ranks, expected, top1):
    if top1:
        one = gradients(folder, Step(DIFFERENT, config={**ALL_LOSSES, "load_balancing_counts": "top1"}))
        assert_same_gradients(on_two_ranks["global_batch-top1"], one)
    else:
        assert_same_gradients(on_two_ranks["global_batch"], expected["different"])


def test_global_batch_scope_weighs_ranks_by_tokens_not_by_labels(folder, on_two_ranks):
    assert_same_gradients(on_two_ranks["global_batch-uneven"], gradients(folder, Step(UNEVEN)))


def test_micro_batch_scope_on_two_ranks_differs_from_the_concatenated_batch_in_the_router(on_two_ranks, expected):
    difference = differences(on_two_ranks["micro_batch"], expected["different"])
    assert all(value > 1e-3 for name, value in difference.items() if ".mlp.gate." in name), difference


def test_global_batch_counts_ignore_padding(on_two_ranks, expected):
    assert_same_gradients(on_two_ranks["global_batch-padded"], expected["different"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_gradient(folder, expected, side):
    assert_same_gradients(gradients(folder, Step(padded(DIFFERENT, side))), expected["different"])


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_activation_checkpointing_does_not_change_the_gradient(folder, expected, use_reentrant):
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    step = Step(DIFFERENT, arguments=options)
    assert_same_gradients(gradients(folder, step), expected["different"])


def make_trainer(folder: Path, output: Path, **arguments) -> Trainer:
    model = HMoEForCausalLM.from_pretrained(folder, **ALL_LOSSES)
    rows = DIFFERENT_LABEL_COUNTS
    options = trainer_arguments(output, per_device_train_batch_size=2, per_device_eval_batch_size=2, **arguments)
    return Trainer(model, options, train_dataset=rows, eval_dataset=rows)


@torch.no_grad()
def test_evaluation_loss_is_pure_cross_entropy(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path)
    model = trainer.model.eval()
    losses = []
    for first in range(0, NUM_ROWS, 2):
        rows = DIFFERENT_LABEL_COUNTS[first : first + 2]
        logits = model(input_ids=torch.tensor([row["input_ids"] for row in rows])).logits[:, :-1]
        labels = torch.tensor([row["labels"] for row in rows])[:, 1:]
        losses.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    # Trainer averages the means of batches, whatever their label counts.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        torch.stack(losses).mean().item(), rel=step_rounding(model.config, LENGTH, 2 * LENGTH)
    )


@pytest.mark.parametrize("output_router_logits", [False, True], ids=["plain", "output_router_logits"])
def test_prediction_gathers_the_logits_alone(folder, tmp_path, output_router_logits):
    trainer = make_trainer(folder, tmp_path)
    trainer.model.config.output_router_logits = output_router_logits
    predictions = trainer.predict(DIFFERENT).predictions
    assert predictions.shape == (NUM_ROWS, LENGTH, trainer.model.config.vocab_size)


def test_a_resumed_run_equals_the_run_that_was_not_stopped(folder, tmp_path):
    schedule = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "learning_rate": 1e-2}
    whole = make_trainer(folder, tmp_path / "whole", **schedule)
    whole.train()
    whole.save_model(str(tmp_path / "final"))

    resumed = make_trainer(folder, tmp_path / "resumed", **schedule)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    final = HMoEForCausalLM.from_pretrained(tmp_path / "final")
    for name, tensor in final.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_trainers_checkpoints_carry_the_code(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path, max_steps=1, save_steps=1, save_strategy="steps")
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for saved in (tmp_path / "checkpoint-1", tmp_path / "final"):
        for reference in json.loads((saved / "config.json").read_text())["auto_map"].values():
            assert (saved / f"{reference.partition('.')[0]}.py").is_file()
