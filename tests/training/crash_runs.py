"""Training runs in processes of their own that get killed.

The processes are forked from a server that has imported everything, so that starting one costs no time.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from tiny_training import tiny_data, tiny_model, tiny_trainer
from transformers import TrainerCallback

from hmoe.training import checkpointing, trainer


_SERVER = multiprocessing.get_context("forkserver")
# The server does not look for modules in the folder of the tests.
_SERVER.set_forkserver_preload(["hmoe.training.arguments", "hmoe.training.trainer", "hmoe.modeling_hmoe", "datasets"])


def start(target: Callable[..., None], *args: Any, ranks: int = 1, **kwargs: Any) -> list[BaseProcess]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port} if ranks > 1 else {}
        process = _SERVER.Process(target=_run, args=(target, environment, args, kwargs), daemon=True)
        process.start()
        processes.append(process)
    return processes


def finish(processes: list[BaseProcess], timeout: float = 120) -> int:
    """The exit code; negative for a signal."""
    for process in processes:
        process.join(timeout)
    return processes[0].exitcode


def _run(target: Callable[..., None], environment: dict[str, Any], args: tuple, kwargs: dict[str, Any]) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    try:
        target(*args, **kwargs)
    except Exception:
        traceback.print_exc()
        # Neither a destructor nor an exit handler may keep the process.
        sys.stderr.flush()
        os._exit(1)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def train(
    folder: Path,
    *,
    resume: str | bool = "auto",
    kill_at: str | None = None,
    error_file: Path | None = None,
    max_file_size: int | None = None,
    **arguments: Any,
) -> None:
    """Two and a half epochs with dropout, accumulation and a schedule; a checkpoint every other step."""
    fields = {
        "max_steps": 15,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "lr_scheduler_type": "cosine",
    }
    runner = tiny_trainer(folder, tiny_model(), tiny_data(48), **{**fields, **arguments})
    if kill_at:
        MOMENTS[kill_at]()
    if max_file_size:
        runner.add_callback(FillDisk(max_file_size))
    try:
        runner.train(resume_from_checkpoint=resume)
    except checkpointing.CheckpointError as error:
        error_file.write_text(str(error))
        raise
    if runner.is_world_process_zero():
        (folder / "finished").write_text(digest(runner.model))


def digest(model: torch.nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode() + tensor.numpy().tobytes())
    return total.hexdigest()


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class FillDisk(TrainerCallback):
    """From step 6 on, no file can grow beyond so many bytes: what a full disk does to a save."""

    def __init__(self, size: int):
        self.size = size

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


def _half_of_the_optimizer(self, folder):
    Path(folder, "optimizer.pt").write_bytes(b"PK" + bytes(1000))
    die()


def _half_of_the_manifest(path, text):
    path.write_text(text[: len(text) // 2])
    die()


def _after(function: Callable[..., Any]) -> Callable[..., None]:
    def call(*args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)
        die()

    return call


def _half_deleted(delete: Callable[..., None]) -> Callable[..., None]:
    def call(folder: Path, **kwargs: Any) -> None:
        if checkpointing.OLD_PREFIX in str(folder) and folder.exists():
            next(folder.glob("*.safetensors")).unlink()
            die()
        delete(folder, **kwargs)

    return call


def _patch(owner: Any, name: str, replacement: Callable[..., Any]) -> Callable[[], None]:
    return lambda: setattr(owner, name, replacement)


MOMENTS = {
    "after the rename": _patch(trainer, "publish_checkpoint", _after(trainer.publish_checkpoint)),
    "before anything is written": _patch(trainer.HMoETrainer, "_write_checkpoint", die),
    "after the weights": _patch(trainer.HMoETrainer, "save_model", _after(trainer.HMoETrainer.save_model)),
    "in the middle of the optimizer": _patch(
        trainer.HMoETrainer, "_save_optimizer_and_scheduler", _half_of_the_optimizer
    ),
    "before the manifest": _patch(trainer, "write_manifest", die),
    "in the middle of the manifest": _patch(checkpointing, "_write_flushed", _half_of_the_manifest),
    "before the rename": _patch(trainer, "publish_checkpoint", die),
    "while an old checkpoint is deleted": _patch(shutil, "rmtree", _half_deleted(shutil.rmtree)),
}
