"""`Trainer` that shows what the router does and loses nothing when the machine dies.

    trainer = HMoETrainer(model=model, args=TrainingArguments("run"), train_dataset=train, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint="auto")

Any causal language model trains with it; what it does not have (experts, router losses) is not logged.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import Trainer
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from hmoe.configuration_hmoe import is_hmoe
from hmoe.costs import model_costs

from .arguments import RunOptions
from .budget import BudgetCallback
from .callbacks import JsonlMetrics, RouterHeatMaps, StopOnSigterm, TrainingStopped
from .checkpointing import (
    STAGING_PREFIX,
    CheckpointError,
    check_writable,
    clear_save_errors,
    clear_staging,
    delete_old_checkpoints,
    publish_checkpoint,
    resolve_checkpoint,
    write_manifest,
)
from .publish import run_info_of, write_model_card
from .router_log import RouterMetrics, RouterWindow, summarise
from .sharded import checkpoints_allowed, is_sharded, load_states, load_weights, save_states


class HMoETrainer(Trainer):
    """Takes what `Trainer` takes; `args` may be plain `TrainingArguments` or `HMoETrainingArguments`.

    Training logs gain the entries of [`hmoe.training.router_log.summarise`], `tokens_per_second`, `flops_per_second`
    (of training steps alone, all ranks together), `tokens_seen` and `train_flops`, counted by the experts that were
    activated. Evaluation reports the mean cross-entropy of a token (`eval_loss`), without router losses, and its
    exponential (`eval_perplexity`). With `max_train_tokens` or `max_train_flops` a run stops at the first step that
    reaches them. Checkpoints are complete or absent ([`hmoe.training.checkpointing`]). SIGTERM saves one and raises
    [`TrainingStopped`], which ends the process with code 143.

    Raises:
        CheckpointError: `output_dir` cannot be written; a checkpoint cannot be saved; the one to resume from is
            damaged, or there is none.
    """

    def __init__(self, model: Any = None, args: Any = None, *rest: Any, **kwargs: Any):
        if args is not None:
            check_writable(args.output_dir)
        with checkpoints_allowed(model, args):
            super().__init__(model, args, *rest, **kwargs)
        self.router_window: RouterWindow | None = None
        self.card_info: dict[str, Any] = {}
        self._metrics = RouterMetrics()
        self._pending = RouterWindow()
        self._eval_metrics: RouterMetrics | None = None
        self._window_start = self._paused = 0.0
        tokens, flops = self._option("max_train_tokens"), self._option("max_train_flops")
        self._has_budget = tokens is not None or flops is not None
        if self._has_budget:
            self.add_callback(BudgetCallback(self._collect, max_tokens=tokens, max_flops=flops))
        self._stop = StopOnSigterm(self.accelerator)
        self.add_callback(self._stop)
        if self._option("metrics_file"):
            path = Path(self.args.output_dir) / self._option("metrics_file")
            self.add_callback(JsonlMetrics(path, lambda: self.router_window))
        boards = [board for board in self.callback_handler.callbacks if isinstance(board, TensorBoardCallback)]
        if boards and self._option("router_heat_maps"):
            self.add_callback(RouterHeatMaps(boards[0], lambda: self.router_window, self.model.config))

    def _option(self, name: str) -> Any:
        """A field of [`RunOptions`], or its default for those who bring plain `TrainingArguments`."""
        return getattr(self.args, name, getattr(RunOptions, name))

    @property
    def _measures(self) -> bool:
        return self._option("router_metrics") != "off"

    @property
    def _counts(self) -> bool:
        return self._measures or self._has_budget

    # Metrics

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        config = self.model.config
        measured = inputs
        if is_hmoe(config):
            if model.training and self._counts:
                measured = {**inputs, "output_router_logits": True}
        elif not model.training and getattr(config, "output_router_logits", False):
            # Stock MoE models add their router loss in evaluation too, unless it is not computed.
            measured = {**inputs, "output_router_logits": False}
        loss, outputs = super().compute_loss(
            model, measured, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        metrics: RouterMetrics | None = self._eval_metrics
        if model.training:
            metrics = self._metrics if self._counts else None
        if metrics is not None:
            metrics.update(
                outputs if isinstance(outputs, dict) else {},
                inputs,
                config,
                num_items_in_batch=num_items_in_batch,
                loss_scale=self._loss_scale(num_items_in_batch),
            )
        return (loss, outputs) if return_outputs else loss

    def _loss_scale(self, num_items_in_batch: Tensor | int | None) -> int:
        """By what `Trainer.compute_loss` multiplies the loss in place, because DDP will divide by it."""
        if num_items_in_batch is None or not self.args.average_tokens_across_devices:
            return 1
        if not (self.model_accepts_loss_kwargs or self.compute_loss_func):
            return 1
        return self.accelerator.num_processes // self.get_tp_size() if self.args.n_gpu <= 1 else self.args.n_gpu

    def _reduce(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0 where [`HMoETrainer.store_flos`] counts what the experts really did; else the estimate of `Trainer`."""
        return 0 if self._measures else super().floating_point_ops(inputs)

    def store_flos(self) -> None:
        if self._measures:
            self._collect()
        else:
            super().store_flos()

    def _collect(self) -> RouterWindow:
        """The forward passes since the last call, on all ranks; they also join the window of the next log."""
        window = self._metrics.collect(self._reduce, replicas=self.get_tp_size())
        if self._measures:
            self._pending = self._pending + window
            self.state.total_flos += window.flops
            if self.args.include_num_input_tokens_seen == "no":
                self.state.num_input_tokens_seen += round(window.tokens)
        return window

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._measures:
            logs.update(self._window_entries())
        super().log(logs, start_time)

    def _window_entries(self) -> dict[str, float]:
        window, self._pending = self._pending, RouterWindow()
        self.router_window = window
        now = time.perf_counter()
        seconds = max(now - self._window_start - self._paused, 1e-9)
        self._window_start, self._paused = now, 0.0
        return {
            **summarise(window, self.model.config, self._option("router_metrics")),
            "tokens_per_second": window.tokens / seconds,
            "flops_per_second": window.flops / seconds,
            "tokens_seen": self.state.num_input_tokens_seen,
            "train_flops": self.state.total_flos,
        }

    @contextmanager
    def _not_training(self) -> Iterator[None]:
        """Time in here does not count as time of training steps."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    # Evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._not_training():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._eval_metrics = RouterMetrics()
        output = super().evaluation_loop(*args, **kwargs)
        losses = self._eval_metrics.collect(self._reduce).mean_losses()
        self._eval_metrics = None
        if "lm_loss" in losses:
            prefix = kwargs.get("metric_key_prefix", "eval")
            loss = losses["lm_loss"]
            output.metrics[f"{prefix}_loss"] = loss
            output.metrics.setdefault(f"{prefix}_perplexity", math.exp(loss) if loss < 700 else math.inf)
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(model, self._without_repeated_rows(inputs), *args, **kwargs)

    def _without_repeated_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Takes the labels off rows that only fill up the last batch of the ranks, so that no token counts twice."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        if inputs.get("labels") is None:
            return inputs
        labels = inputs["labels"].clone()
        labels[max(state.remainder - self.accelerator.process_index * len(labels), 0) :] = -100
        return {**inputs, "labels": labels}

    def create_model_card(self, **kwargs: Any) -> None:
        """Writes the card of [`hmoe.training.publish`]; `card_info` adds to, and wins over, what the run knows."""
        if not self.is_world_process_zero():
            return
        given = {"base_model": kwargs.get("finetuned_from"), "datasets": kwargs.get("dataset_tags")}
        given |= {name: kwargs.get(name) for name in ("language", "license", "tags")}
        info = {**run_info_of(self), **{name: value for name, value in given.items() if value}, **self.card_info}
        write_model_card(self.model, self.args, str(self.args.output_dir), info)

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`, but resumes from nothing that is damaged.

        Args:
            resume_from_checkpoint: a folder; True for the newest complete checkpoint of `output_dir`, which must
                exist; `"auto"` for the same if there is one.
        """
        resume_from_checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        with self._stop.listening():
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self._stop.requested:
            raise TrainingStopped
        return output

    def _checkpoint_to_resume(self, requested: str | bool | None) -> str | None:
        """Decided by one process for all, because reading every checkpoint on every rank would take its time."""
        answer: list[Any] = [None, None]
        if self.accelerator.is_local_main_process:
            clear_staging(self.args.output_dir)
        if self.accelerator.is_main_process:
            try:
                answer[0] = resolve_checkpoint(requested, self.args.output_dir)
            except CheckpointError as error:
                answer[1] = str(error)
        broadcast_object_list(answer)
        if answer[1] is not None:
            raise CheckpointError(answer[1])
        return answer[0]

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        flops = model_costs(self.model).forward_flops(self._option("flops_convention")) if self._counts else None
        self._metrics, self._pending = RouterMetrics(flops), RouterWindow()
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._window_start, self._paused = time.perf_counter(), 0.0
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run killed after its last checkpoint resumes with nothing left to do; Trainer would take one step more.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if self._stop.requested:
            # Only a finished run loads its best checkpoint and, with `save_total_limit=1`, deletes the last one.
            self.state.best_model_checkpoint = None
        return super()._finalize_training(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's checkpoint, written under another name and given its own when complete."""
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_dir = Path(self._get_output_dir(trial=trial))
        final = run_dir / f"checkpoint-{self.state.global_step}"
        staging = run_dir / f"{STAGING_PREFIX}{final.name}"
        self._note_best_checkpoint(run_dir)
        with self._not_training():
            with clear_save_errors(staging):
                self._write_and_publish(staging, final)
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(final))
            if self.args.should_save:
                delete_old_checkpoints(final, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _write_and_publish(self, staging: Path, final: Path) -> None:
        if self.accelerator.is_local_main_process and staging.exists():
            shutil.rmtree(staging)
        self.accelerator.wait_for_everyone()
        self._write_checkpoint(staging)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(staging)
            publish_checkpoint(staging, final)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_local_main_process and staging.exists():
            # A node with a disk of its own that keeps only the random states of its ranks.
            publish_checkpoint(staging, final)

    def _write_checkpoint(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.save_model(str(folder), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
        if self.args.should_save:
            self._note_callback_states()
            self.state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if is_sharded(self.model):
            save_states(self, output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if is_sharded(self.model):
            load_states(self, checkpoint)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if is_sharded(self.model):
            load_weights(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _note_best_checkpoint(self, run_dir: Path) -> None:
        best = self.state.best_global_step
        if best and (best == self.state.global_step or (run_dir / f"checkpoint-{best}").exists()):
            self.state.best_model_checkpoint = str(run_dir / f"checkpoint-{best}")

    def _note_callback_states(self) -> None:
        stored: dict[str, Any] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                stored.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks = {
            name: states[0] if len(states) == 1 else states for name, states in stored.items()
        }
