"""lm_eval's Hugging Face model, which also measures how much of an MoE each task activates.

Importing this module registers it as the lm_eval model `hmoe`; everything else is lm_eval's own `hf`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from hmoe.costs import moe_costs
from hmoe.routers import RouterTap, routed_layers, tokens_per_expert

from .statistics import activated


@register_model("hmoe")
class RoutingHFLM(HFLM):
    """`hf`, plus the activated parameters in `config.routing` of the results (HMoE Tables 1 and 2).

    Every token that the model reads counts once each time it is read, a context once per answer option; padding does
    not count. lm_eval pads scored text on the right with id 0 and no mask, so an id 0 that ends a text is taken for
    padding. With data parallelism the figures are those of the first process.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._task: str | None = None
        self._mask: Tensor | None = None
        self._num_experts = [len(layer.sizes) for layer in routed_layers(self._model)]
        self._tokens: dict[str, Any] = defaultdict(int)
        # By task, per layer [E]: tokens that activate each expert.
        self._counts: dict[str, list[Any]] = defaultdict(lambda: [0] * len(self._num_experts))
        self._model.register_forward_pre_hook(self._read_inputs, with_kwargs=True)
        self._tap = RouterTap(self._model, self._count)

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
        return self._by_task(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list:
        return self._by_task(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list:
        return self._by_task(super().generate_until, requests, disable_tqdm)

    def _by_task(self, answer: Callable[[list, bool], list], requests: list, disable_tqdm: bool) -> list:
        answers: list = []
        for self._task, of_task in groupby(requests, key=lambda request: request.task_name or ""):
            answers += answer(list(of_task), disable_tqdm)
        self._task = None
        return answers

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        task, self._task = self._task, None  # its probes are no text
        try:
            return super()._detect_batch_size(*args, **kwargs)
        finally:
            self._task = task

    def _read_inputs(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._task is None:
            return
        ids = args[0] if args else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        if torch.is_tensor(mask) and mask.dim() == 2:
            self._mask = mask[:, -ids.shape[1] :].bool()
        else:
            self._mask = (ids != 0).flip(1).cumsum(1).flip(1) > 0  # [B, S]
        self._tokens[self._task] += self._mask.sum()

    def _count(self, layer: int, logits: Tensor, index: Tensor) -> None:
        if self._task is not None:
            self._counts[self._task][layer] += tokens_per_expert(index, self._num_experts[layer], self._mask)

    def routing(self) -> dict[str, Any] | None:
        """Activated parameters over all tasks and by task; None for a dense model, and if every answer was cached."""
        if not self._counts:
            return None
        costs = moe_costs(self._model)

        def summary(tasks: list[str]) -> dict[str, float]:
            tokens = int(sum(self._tokens[task] for task in tasks))
            counts = [sum(layer) for layer in zip(*(self._counts[task] for task in tasks))]
            load = [[n / tokens for n in layer.tolist()] for layer in counts]
            return {"tokens": tokens, **activated(costs, load)}

        tasks = list(self._counts)
        return {**summary(tasks), "tasks": {task: summary([task]) for task in tasks}}

    def get_model_info(self) -> dict[str, Any]:
        return {**super().get_model_info(), "is_moe": bool(self._num_experts), "routing": self.routing()}
