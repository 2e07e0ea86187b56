"""Checkpoints of models that Transformers sharded as it loaded them (`DistributedConfig`).

`Trainer` does not resume such runs. Here weights and optimizer states are gathered and written as one process writes
them, and each rank reads back its part: a run goes on with any other number of ranks and any other sharding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers.distributed.sharding_utils import DtensorShardOperation
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME


def is_sharded(model: Any) -> bool:
    """Whether `from_pretrained(distributed_config=...)` sharded the model."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


@contextmanager
def checkpoints_allowed(model: Any, args: Any) -> Iterator[None]:
    """Lets `Trainer` take a sharded model with checkpoints: it would refuse, because its own would not be whole."""
    refused = args is not None and is_sharded(model) and not args.save_only_model
    if refused:
        args.save_only_model = True
    try:
        yield
    finally:
        if refused:
            args.save_only_model = False


@torch.no_grad()
def load_weights(model: Any, folder: str | Path) -> None:
    """Copies the safetensors of a checkpoint into a sharded model, each rank its part.

    Raises:
        ValueError: if a file holds a tensor that the model has not.
    """
    targets = model.state_dict()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a file is no mapping)
                if name not in targets:
                    raise ValueError(f"{path} holds `{name}`, which the model has not: resume with the same config")
                target = targets[name]
                if isinstance(target, DTensor):
                    part = DtensorShardOperation(target).shard_tensor(file.get_slice(name))
                    target.to_local().copy_(part)
                else:
                    target.copy_(file.get_tensor(name))


def save_states(trainer: Any, folder: str | Path) -> None:
    """Writes optimizer and schedule of a trainer with a sharded model as one process does; all ranks must call it."""
    optimizer = _optimizer_of(trainer)
    # With `cpu_offload` only the first rank gets the states.
    options = StateDictOptions(full_state_dict=True, cpu_offload=not trainer.args.save_on_each_node)
    full: Any = get_optimizer_state_dict(trainer.model, optimizer, options=options)
    if not trainer.args.should_save:
        return
    groups, split = _groups_of_one_process(trainer), _split_groups(trainer.model, optimizer)
    index_of = {name: index for index, name in enumerate(name for group in groups for name in group)}
    state = {index_of[name]: values for name, values in full["state"].items()}
    # Where a group was split by mesh, every piece has its settings; a group without members has those of any other.
    chosen = [next((i for i, names in enumerate(split) if set(names) & set(group)), 0) for group in groups]
    param_groups = [
        {**full["param_groups"][piece], "params": [index_of[name] for name in group]}
        for piece, group in zip(chosen, groups)
    ]
    torch.save({"state": state, "param_groups": param_groups}, Path(folder, OPTIMIZER_NAME))
    schedule = _choose(trainer.lr_scheduler.state_dict(), chosen, len(split))
    torch.save(schedule, Path(folder, SCHEDULER_NAME))


def load_states(trainer: Any, folder: str | Path | None) -> None:
    """Gives each rank its part of them; a checkpoint of weights alone has none.

    Raises:
        ValueError: if the saved optimizer is of a model with other parameters.
    """
    if folder is None or not Path(folder, OPTIMIZER_NAME).exists():
        return
    saved, schedule = (
        torch.load(Path(folder, name), map_location="cpu", weights_only=True)
        for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
    )
    optimizer = _optimizer_of(trainer)
    groups, split = _groups_of_one_process(trainer), _split_groups(trainer.model, optimizer)
    names = [name for group in groups for name in group]
    num_saved = sum(len(group["params"]) for group in saved["param_groups"])
    if num_saved != len(names) or len(saved["param_groups"]) != len(groups):
        raise ValueError(
            f"the saved optimizer has {num_saved} parameters in {len(saved['param_groups'])} groups, this run has "
            f"{len(names)} in {len(groups)}: resume with the config that it was saved with"
        )
    chosen = [next((i for i, group in enumerate(groups) if set(piece) & set(group)), 0) for piece in split]
    full: Any = {
        "state": {name: saved["state"][index] for index, name in enumerate(names) if index in saved["state"]},
        "param_groups": [{**saved["param_groups"][i], "params": piece} for i, piece in zip(chosen, split)],
    }
    set_optimizer_state_dict(trainer.model, optimizer, full, options=StateDictOptions(full_state_dict=True))
    trainer.lr_scheduler.load_state_dict(_choose(schedule, chosen, len(groups)))


def _optimizer_of(trainer: Any) -> torch.optim.Optimizer:
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # within Accelerate's


def _groups_of_one_process(trainer: Any) -> list[list[str]]:
    """Names of the trained parameters: those with weight decay, then the others."""
    decayed = trainer.get_decay_parameter_names(trainer.model)
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    return [[name for name in trained if (name in decayed) == wanted] for wanted in (True, False)]


def _split_groups(model: Any, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Names by group of the optimizer, which `Trainer` splits where parameters lie on several meshes."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[name_of[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _choose(schedule: dict[str, Any], groups: list[int], num_groups: int) -> dict[str, Any]:
    """A scheduler's state with its lists by group rearranged."""
    return {
        key: [value[group] for group in groups] if isinstance(value, list) and len(value) == num_groups else value
        for key, value in schedule.items()
    }
