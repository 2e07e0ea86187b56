"""Checkpoints of models that Transformers sharded as it loaded them (`DistributedConfig`).

`Trainer` does not resume such runs. Here weights and optimizer states are gathered and written as one process writes
them, and each rank reads back its part: a run goes on with any other number of ranks and any other sharding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
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


class ShardedStates:
    """Optimizer and schedule of a sharded run, in the form of a run of one process.

    `Trainer` makes two groups of parameters, those with weight decay first, and splits them where a sharded model's
    parameters lie on several meshes; the form of one process has the two.

    Args:
        decayed: names of the parameters with weight decay.
    """

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, decayed: Collection[str]):
        self.model, self.optimizer = model, optimizer
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        groups = [[name for name in trained if (name in decayed) == wanted] for wanted in (True, False)]
        self.names = [name for group in groups for name in group]
        self.group_of_name = {name: number for number, group in enumerate(groups) for name in group}
        self.num_groups = len(groups)
        name_of = {id(parameter): name for name, parameter in model.named_parameters()}
        self.split_groups = [[name_of[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        self.group_of_split = [self.group_of_name[names[0]] if names else 0 for names in self.split_groups]

    def gather(self, scheduler: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """State dicts of optimizer and scheduler, on CPU; all ranks must call it."""
        states = {}
        for index, name in enumerate(self.names):
            values = self.optimizer.state.get(self.model.get_parameter(name), {})
            if values:
                states[index] = {key: _gathered(value) for key, value in values.items()}
        # A group without members (nothing is decayed) has the settings of any other.
        chosen = [self.group_of_split.index(number) if number in self.group_of_split else 0 for number in range(2)]
        groups = []
        for number, split in enumerate(chosen):
            members = [index for index, name in enumerate(self.names) if self.group_of_name[name] == number]
            groups.append({**self.optimizer.param_groups[split], "params": members})
        schedule = _choose(scheduler.state_dict(), chosen, len(self.split_groups))
        return {"state": states, "param_groups": groups}, schedule

    def load(self, scheduler: Any, state: dict[str, Any], schedule: dict[str, Any]) -> None:
        """Gives this rank its part of what [`gather`], or a run of one process, saved.

        Raises:
            ValueError: if the saved optimizer is of a model with other parameters.
        """
        saved = sum(len(group["params"]) for group in state["param_groups"])
        if saved != len(self.names) or len(state["param_groups"]) != self.num_groups:
            raise ValueError(
                f"the saved optimizer has {saved} parameters in {len(state['param_groups'])} groups, this run has "
                f"{len(self.names)} in {self.num_groups}: resume with the config that it was saved with"
            )
        index_of = {name: index for index, name in enumerate(self.names)}
        groups: list[dict[str, Any]] = []
        states: dict[int, dict[str, Any]] = {}
        for number, names in zip(self.group_of_split, self.split_groups):
            positions = range(len(states), len(states) + len(names))
            for position, name in zip(positions, names):
                parameter = self.model.get_parameter(name)
                values = state["state"].get(index_of[name], {})
                states[position] = {key: _part_of(value, parameter) for key, value in values.items()}
            groups.append({**state["param_groups"][number], "params": list(positions)})
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})
        scheduler.load_state_dict(_choose(schedule, self.group_of_split, self.num_groups))


def save_states(trainer: Any, folder: str | Path) -> None:
    """Writes optimizer and schedule of a trainer with a sharded model as one process does; all ranks must call it."""
    optimizer, schedule = _states_of(trainer).gather(trainer.lr_scheduler)
    if trainer.args.should_save:
        torch.save(optimizer, Path(folder, OPTIMIZER_NAME))
        torch.save(schedule, Path(folder, SCHEDULER_NAME))


def load_states(trainer: Any, folder: str | Path | None) -> None:
    """Reads them back; a checkpoint of weights alone has none."""
    if folder is None or not Path(folder, OPTIMIZER_NAME).exists():
        return
    names = (OPTIMIZER_NAME, SCHEDULER_NAME)
    saved = [torch.load(Path(folder, name), map_location="cpu", weights_only=True) for name in names]
    _states_of(trainer).load(trainer.lr_scheduler, *saved)


def _states_of(trainer: Any) -> ShardedStates:
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # within Accelerate's
    return ShardedStates(trainer.model, optimizer, trainer.get_decay_parameter_names(trainer.model))


def _choose(schedule: dict[str, Any], groups: list[int], num_groups: int) -> dict[str, Any]:
    """A scheduler's state with its lists by group rearranged."""
    return {
        key: [value[group] for group in groups] if isinstance(value, list) and len(value) == num_groups else value
        for key, value in schedule.items()
    }


def _gathered(value: Any) -> Any:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.cpu() if torch.is_tensor(value) else value


def _part_of(value: Any, parameter: Tensor) -> Any:
    if not isinstance(parameter, DTensor) or not torch.is_tensor(value) or value.shape != parameter.shape:
        return value
    part = DtensorShardOperation(parameter).shard_tensor(value, device=parameter.device)
    return DTensor.from_local(
        part.contiguous(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
