"""Training budgets in tokens and FLOPs, exact to the step and kept through a resume."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hmoe.costs import TRAIN_FACTOR, FlopsMeter, ForwardFlops


class BudgetCallback(TrainerCallback, ExportableState):
    """Counts trained tokens and FLOPs over all ranks, and stops at the first step that reaches a budget.

    The counts are saved with the trainer's state, so a resumed run goes on counting.

    Attributes:
        tokens, flops: trained so far, padding included.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_tokens: int | None = None,
        max_flops: float | None = None,
        convention: str = "matmul",
    ):
        self.meter = FlopsMeter(model, convention)
        self.max_tokens = max_tokens
        self.max_flops = max_flops
        self._tokens = 0
        self._flops = 0
        self._pending: Tensor | None = None

    @property
    def tokens(self) -> int:
        self._settle()
        return self._tokens

    @property
    def flops(self) -> int:
        self._settle()
        return self._flops

    def _settle(self) -> None:
        if self._pending is not None:
            tokens, flops = self._pending.tolist()
            self._pending = None
            self._tokens += tokens
            self._flops += flops

    def _is_spent(self) -> bool:
        if self.max_flops is not None and self.flops >= self.max_flops:
            return True
        return self.max_tokens is not None and self.tokens >= self.max_tokens

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"tokens": self.tokens, "flops": self.flops}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self._tokens, self._flops = saved["attributes"]["tokens"], saved["attributes"]["flops"]
        self._pending = None
        self.meter.take()
        # A run that ended on its budget has nothing left to do when it is started again.
        control.should_training_stop = self._is_spent()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        from accelerate.utils import reduce

        step = reduce(self.meter.take(args.device), reduction="sum")
        self._pending = step if self._pending is None else self._pending + step
        if self._is_spent():
            control.should_training_stop = True
            control.should_log = True
            control.should_save = control.should_save or args.save_strategy == "steps"
            control.should_evaluate = control.should_evaluate or args.eval_strategy == "steps"


def steps_for_budget(
    flops: ForwardFlops,
    *,
    max_steps: int,
    max_tokens: int | None,
    max_flops: float | None,
    tokens_per_step: int,
    length: int,
) -> int:
    """The number of steps that the trainer has to plan for, -1 if no budget is given.

    Tokens give it exactly. FLOPs that depend on routing give the most steps there can be; the callback stops earlier.
    """
    limits = [max_steps] if max_steps > 0 else []
    if max_tokens is not None:
        limits.append(math.ceil(max_tokens / tokens_per_step))
    if max_flops is not None:
        limits.append(math.ceil(max_flops / (TRAIN_FACTOR * flops.least(tokens_per_step, length))))
    return min(limits) if limits else -1


def tokens_per_step(args: TrainingArguments, length: int) -> int:
    """Tokens of one optimizer step over all ranks, for sequences of `length`."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size * length
