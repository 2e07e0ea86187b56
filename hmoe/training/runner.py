"""One training run, from parsed arguments to the saved model."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Any

import yaml
from transformers import set_seed

from hmoe.costs import ForwardFlops, model_costs
from hmoe.metrics import NextTokenMetrics, score_tokens

from .budget import steps_for_budget
from .data import build_data, with_padding
from .model import add_lora, build_config, build_model
from .publish import push_folder
from .recipe import Arguments
from .tokenizer import build_tokenizer
from .trainer import HMoETrainer


class Run:
    """One training run; making it reads the data and builds model and trainer, [`train`] does the rest.

    Raises:
        ValueError: if the arguments, the data or the model they name cannot be used.
    """

    def __init__(self, arguments: Arguments):
        self.arguments = arguments
        self.args = args = copy(arguments.training)  # the budgets set its number of steps
        self.output_dir = Path(str(args.output_dir))
        resuming = self._is_resuming()
        set_seed(args.seed)
        with args.main_process_first(desc="tokenizer"):
            self.tokenizer = build_tokenizer(
                arguments.tokenizer, arguments.model, arguments.data, self.output_dir, resuming=resuming
            )
        if arguments.data.task == "instruct":
            self.tokenizer = with_padding(self.tokenizer)
        config = build_config(arguments.model, self.tokenizer)
        self.length = self._sequence_length(config)
        with args.main_process_first(desc="data"):
            self.data = build_data(
                arguments.data,
                self.tokenizer,
                self.length,
                seed=args.seed if args.data_seed is None else args.data_seed,
                flatten=str(arguments.model.attn_implementation).startswith("flash"),
            )
        self._check_evaluation()
        # The initial weights are those of the seed, whatever was drawn for the data.
        set_seed(args.seed)
        model = build_model(arguments.model, config)
        if arguments.lora.lora:
            model = add_lora(model, arguments.lora)
        self._plan_steps(model_costs(model).forward_flops(args.flops_convention))
        metrics: dict[str, Any] = {}
        if self.data.validation is not None:
            args.batch_eval_metrics = True
            metrics = {"compute_metrics": NextTokenMetrics(), "preprocess_logits_for_metrics": score_tokens}
        self.trainer = HMoETrainer(
            model=model,
            args=args,
            data_collator=self.data.collate,
            train_dataset=self.data.train,
            eval_dataset=self.data.validation,
            processing_class=self.tokenizer,
            **metrics,
        )

    def _is_resuming(self) -> bool:
        args = self.args
        checkpoints = sorted(self.output_dir.glob("checkpoint-*"))
        if args.resume == "never" and checkpoints:
            raise ValueError(
                f"`resume`='never', but `output_dir`={args.output_dir!r} holds {len(checkpoints)} checkpoints of "
                "another run: name another folder, or remove them"
            )
        if args.resume not in ("auto", "never") and not Path(args.resume).is_dir():
            raise ValueError(f"`resume`={args.resume!r} is no checkpoint folder: give one, 'auto' or 'never'")
        return args.resume != "never" and bool(checkpoints)

    def _sequence_length(self, config: Any) -> int:
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        length = self.arguments.data.sequence_length or longest
        if length is None:
            raise ValueError("give `sequence_length`: the config of this model names no `max_position_embeddings`")
        if longest is not None and length > longest:
            raise ValueError(
                f"`sequence_length`={length} is more than the model's `max_position_embeddings`={longest}: lower it, "
                f"or raise `model_config.max_position_embeddings`"
            )
        return length

    def _check_evaluation(self) -> None:
        strategy = self.args.eval_strategy
        if strategy != "no" and self.data.validation is None:
            raise ValueError(
                f"`eval_strategy`={getattr(strategy, 'value', strategy)!r} but there are no validation data: give "
                "`validation_fraction` or `validation_dataset`"
            )

    def _plan_steps(self, flops: ForwardFlops) -> None:
        """Sets `max_steps` from the budgets; conversations vary in length, so there the callback alone counts."""
        if self.arguments.data.task == "pretrain":
            self.args.max_steps = steps_for_budget(self.args, flops, self.length)
        if self.arguments.data.streaming and self.args.max_steps < 1:
            raise ValueError(
                "`streaming` data have no end: give a budget with `max_steps`, `max_train_tokens` or `max_train_flops`"
            )

    def train(self) -> dict[str, float]:
        """Trains, evaluates, saves model, tokenizer, metrics and card; returns the metrics."""
        trainer, args = self.trainer, self.args
        self._save_recipe()
        output = trainer.train(resume_from_checkpoint=None if args.resume == "never" else args.resume)
        metrics = dict(output.metrics)
        if self.data.validation is not None:
            metrics |= trainer.evaluate()
        trainer.save_model(_internal_call=True)  # otherwise it pushes too, before there is a card
        trainer.save_state()
        trainer.save_metrics("all", metrics)
        self._publish(metrics)
        if self.arguments.lora.lora and self.arguments.lora.lora_merge:
            self._save_merged()
        return metrics

    def _save_recipe(self) -> None:
        """What was set, in OUTPUT_DIR/recipe.yaml: the run can be repeated from it."""
        if self.trainer.is_world_process_zero():
            self.output_dir.mkdir(parents=True, exist_ok=True)
            path = self.output_dir / "recipe.yaml"
            path.write_text(yaml.safe_dump(self.arguments.recipe, sort_keys=False), encoding="utf-8")

    def _save_merged(self) -> None:
        """The model with its adapters merged, as a checkpoint of its own; uses up the model of the trainer."""
        if self.trainer.is_world_process_zero():
            folder = self.output_dir / "merged"
            merged = self.trainer.accelerator.unwrap_model(self.trainer.model).merge_and_unload()
            merged.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def _publish(self, metrics: dict[str, float]) -> None:
        """The model card, from what the run measured, and the final folder to the Hub with `push_to_hub`."""
        trainer, args, window = self.trainer, self.args, self.trainer.router_window
        if not trainer.is_world_process_zero():
            return
        evaluation = ("eval_loss", "eval_perplexity", "eval_accuracy")
        trainer.card_info = {
            "seconds": metrics.get("train_runtime"),
            "losses": window.mean_losses() if window else {},
            "evaluation": {name: metrics[name] for name in evaluation if name in metrics},
            "data": [part.sentence() for part in self.data.parts],
            "datasets": [part.source.path for part in self.data.parts if part.source.is_on_hub],
            "recipe": self.arguments.recipe,
            "base_model": self.arguments.model.model_name_or_path,
        }
        trainer.create_model_card()
        if args.push_to_hub:
            push_folder(
                self.output_dir,
                args.hub_model_id or self.output_dir.resolve().name,
                token=args.hub_token,
                private=args.hub_private_repo,
                revision=args.hub_revision,
            )
