"""Training budgets in tokens and FLOPs, exact to the step and kept through a resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hmoe.costs import TRAIN_FACTOR, ForwardFlops

from .arguments import HMoETrainingArguments
from .router_log import RouterWindow


class BudgetCallback(TrainerCallback, ExportableState):
    """Stops a run at the first step that reaches a budget of tokens or FLOPs, all ranks at the same step.

    The counts are saved with the trainer's state, so a resumed run goes on counting.

    Args:
        collect: gives the forward passes since its last call, summed over all ranks; every rank calls it together.
        max_tokens, max_flops: the budgets.

    Attributes:
        tokens, flops: trained so far, padding included.
    """

    def __init__(
        self, collect: Callable[[], RouterWindow], *, max_tokens: int | None = None, max_flops: float | None = None
    ):
        self.collect = collect
        self.max_tokens = max_tokens
        self.max_flops = max_flops
        self.tokens = self.flops = 0

    def _is_spent(self) -> bool:
        limits = ((self.tokens, self.max_tokens), (self.flops, self.max_flops))
        return any(limit is not None and count >= limit for count, limit in limits)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"tokens": self.tokens, "flops": self.flops}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.tokens, self.flops = saved["attributes"]["tokens"], saved["attributes"]["flops"]
        # A run that ended on its budget has nothing left to do when it is started again.
        control.should_training_stop = self._is_spent()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        window = self.collect()
        self.tokens += round(window.padded_tokens)
        self.flops += round(window.flops)
        if self._is_spent():
            control.should_training_stop = True
            control.should_log = True
            control.should_save = control.should_save or args.save_strategy == "steps"
            control.should_evaluate = control.should_evaluate or args.eval_strategy == "steps"


def steps_for_budget(args: HMoETrainingArguments, flops: ForwardFlops, length: int) -> int:
    """The number of steps that the trainer has to plan for, for sequences of `length`; -1 if no budget is given.

    Tokens give it exactly. FLOPs that depend on routing give the most steps there can be; the callback stops earlier.
    """
    tokens_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * length
    limits = [args.max_steps] if args.max_steps > 0 else []
    if args.max_train_tokens is not None:
        limits.append(math.ceil(args.max_train_tokens / tokens_per_step))
    if args.max_train_flops is not None:
        limits.append(math.ceil(args.max_train_flops / (TRAIN_FACTOR * flops.least(tokens_per_step, length))))
    return min(limits, default=-1)
