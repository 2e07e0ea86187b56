"""Trainer callbacks: metrics as jsonl on disk, heat maps of expert load in TensorBoard, an orderly stop on SIGTERM."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from hmoe.heat_map import load_figure

from .router_log import RouterWindow


logger = logging.getLogger(__name__)

STOPPED_EXIT_CODE = 128 + signal.SIGTERM

_MOST_HEAT_MAPS = 100


class TrainingStopped(SystemExit):
    """Raised once a run that got SIGTERM has saved its checkpoint; if nobody catches it, the exit code is 143."""

    def __init__(self) -> None:
        super().__init__(STOPPED_EXIT_CODE)


class JsonlMetrics(TrainerCallback):
    """Appends every log to a file as a line of JSON, with `step` and, for MoE models, `load` by layer and expert.

    After a resume the lines of steps that will be run again are dropped, so that each step is there once. A file of
    another run is moved aside.
    """

    def __init__(self, path: str | os.PathLike, window: Callable[[], RouterWindow | None]):
        self.path = Path(path)
        self.window = window
        self._opened = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.is_world_process_zero and state.global_step:
            self._drop_lines_after(state.global_step)
        elif state.is_world_process_zero and not self._opened:
            self._move_aside()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        if not self._opened and not state.global_step:
            self._move_aside()
        logs = kwargs["logs"]
        line = {"step": state.global_step, **logs}
        window = self.window()
        if "loss" in logs and window is not None and window.expert_tokens:
            line["load"] = [[round(share, 6) for share in row] for row in window.load()]
        self._opened = True
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, default=float) + "\n")
        except OSError as error:
            # A log is not worth a run; a checkpoint that cannot be saved will say so.
            logger.warning("Metrics of step %d not written to %s: %s", state.global_step, self.path, error)

    def _drop_lines_after(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                logger.warning("%s: dropped a line that a killed run left unfinished: %.60r", self.path, line)
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self.path)
        self._opened = True

    def _move_aside(self) -> None:
        if not self.path.exists():
            return
        number = 1
        while (aside := self.path.with_name(f"{self.path.stem}.{number}{self.path.suffix}")).exists():
            number += 1
        self.path.rename(aside)
        logger.warning("%s is of another run: moved to %s", self.path, aside)


class RouterHeatMaps(TrainerCallback):
    """Draws the load by layer and expert ([`hmoe.heat_map`]) into TensorBoard, at most about a hundred times a run."""

    def __init__(self, tensorboard: TensorBoardCallback, window: Callable[[], RouterWindow | None], config: Any):
        self.tensorboard = tensorboard
        self.window = window
        self.sizes = getattr(config, "layer_expert_sizes", None)
        self._last_step = 0

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        window, writer = self.window(), self.tensorboard.tb_writer
        due = state.global_step - self._last_step >= state.max_steps / _MOST_HEAT_MAPS
        if writer is None or window is None or not window.expert_tokens or "loss" not in kwargs["logs"] or not due:
            return
        self._last_step = state.global_step
        figure = load_figure(window.load(), self.sizes)
        writer.add_figure("router/load_by_layer_and_expert", figure, state.global_step)


class StopOnSigterm(TrainerCallback):
    """On SIGTERM: finish the step, save a checkpoint and stop, all ranks at the same step."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.requested = False  # by any rank, known to all
        self._signalled = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles SIGTERM inside the context; outside the main thread, where Python gets no signals, does nothing."""
        self.requested = self._signalled = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGTERM, self._request)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    # Launchers and schedulers both signal the workers, so that a second signal is no sign of impatience.
    def _request(self, signum: int, frame: Any) -> None:
        self._signalled = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.requested = self._signalled
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(int(self._signalled), device=self.accelerator.device)
            self.requested = bool(self.accelerator.reduce(flag, reduction="sum").item())
        if self.requested:
            logger.warning("SIGTERM: saving a checkpoint of step %d and stopping", state.global_step)
            control.should_save = True
            control.should_training_stop = True
