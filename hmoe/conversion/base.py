"""What every conversion does around its tensors: write atomically, copy what belongs along, check, describe."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save

from ..cards import write_card
from ..configuration_hmoe import HMoEConfig
from ..costs import model_costs
from ..modeling_hmoe import HMoEForCausalLM
from .check import CheckFailed, CheckResult, ForcedRouting, compare_logits, fits_in_memory
from .checkpoint import SourceCheckpoint, output_folder, write_checkpoint


CAST_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_COPIED = [
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("*.tiktoken", "chat_template*", "additional_chat_templates", "generation_config.json", "LICENSE*", "NOTICE*"),
]


@dataclass(frozen=True)
class Options:
    """What all conversions have in common.

    Attributes:
        dtype: name of the data type to write; None keeps the source's.
        overwrite: replace an existing checkpoint at the target, at the very end.
        check: compare the logits of source and target before the target appears.
        check_text: a text file for the check; None takes a speech.
        command: the arguments of `hmoe` that asked for this, for the model card.
        progress: show a progress bar; None shows it on a terminal only.
    """

    dtype: str | None = None
    overwrite: bool = False
    check: bool = True
    check_text: str | None = None
    command: Sequence[str] | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in CAST_DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(CAST_DTYPES)}, got {self.dtype!r}")

    def written_dtype(self, source_dtype: torch.dtype) -> torch.dtype:
        return source_dtype if self.dtype is None else CAST_DTYPES[self.dtype]


@dataclass
class Plan:
    """A conversion that is ready to be written.

    Attributes:
        config: of the target; its dtype is set when the conversion is executed.
        tensors: names and tensors of the target, made while they are written, in this order.
        settings: arguments of the conversion, for the model card.
        exact: the target's logits equal the source's.
        forced: a routing under which they do, for targets that are not exact with their own router.
        factor: whole number by which weights are multiplied, if any: rounding it may cost exactness.
        notes: what a reader of the card must know; printed too.
    """

    source: SourceCheckpoint
    config: PreTrainedConfig
    tensors: Iterator[tuple[str, Tensor]]
    settings: Mapping[str, Any]
    exact: bool = False
    forced: ForcedRouting | None = None
    factor: int = 1
    notes: list[str] = field(default_factory=list)

    @property
    def num_parameters(self) -> int:
        """Of the target."""
        return model_costs(self.config).parameters


@dataclass(frozen=True)
class Conversion:
    """What was made: `str()` of it is the report that the command prints."""

    target: Path
    config: PreTrainedConfig
    num_bytes: int
    check: CheckResult | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.target}: {self.config.model_type}, {self.num_bytes / 1e6:,.1f} MB of weights"]
        return "\n".join([*lines, *self.notes, str(self.check) if self.check else "not checked"])


def execute(plan: Plan, target: str | Path, options: Options) -> Conversion:
    """Writes the target, whole or not at all.

    Raises:
        ValueError: a broken source, a target that may not be replaced, or tensors that the conversion did not expect.
        CheckFailed: the logits should be equal and are not; nothing is left at the target.
    """
    plan.config.dtype = options.written_dtype(plan.source.dtype)
    with output_folder(target, plan.source.folder, overwrite=options.overwrite) as folder:
        dtype = None if options.dtype is None else plan.config.dtype
        tensors = ((name, tensor.to(dtype or tensor.dtype)) for name, tensor in plan.tensors)
        total_bytes = plan.num_parameters * plan.config.dtype.itemsize
        num_bytes = write_checkpoint(folder, tensors, total_bytes=total_bytes, progress=options.progress)
        plan.source.refuse_unused()
        _copy_companions(plan.source.folder, folder)
        if isinstance(plan.config, HMoEConfig):
            custom_object_save(HMoEForCausalLM, folder)
            plan.config.architectures = plan.config.architectures or [HMoEForCausalLM.__name__]
        check = _check(plan, folder, options)
        if check is not None and not check.passed:
            raise CheckFailed(
                f"{check}. These should be equal; nothing was written to {target}. Please report it with the model; "
                "--no_check skips this check"
            )
        conversion = Conversion(Path(target), plan.config, num_bytes, check, tuple(plan.notes))
        _write_card(plan, folder, options, conversion)
        plan.config.save_pretrained(folder)  # last: until now the folder does not load
    return conversion


def _copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, chat templates, generation config and licence, as they are."""
    for pattern in _COPIED:
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, folder / path.name)


def _check(plan: Plan, folder: Path, options: Options) -> CheckResult | None:
    if not options.check:
        return None
    if not fits_in_memory(plan.num_parameters):
        size = f"{plan.num_parameters / 1e9:.1f} B parameters"
        plan.notes.append(f"not checked: {size} in fp32 do not fit into free memory")
        return None
    # Whether the weights, and their multiples by `factor`, survive being written.
    is_power_of_two = plan.factor & (plan.factor - 1) == 0
    dtype = plan.config.dtype
    keeps_weights = dtype == torch.float32 or (dtype == plan.source.dtype and is_power_of_two)
    return compare_logits(
        plan.source.folder,
        folder,
        plan.config,
        options.check_text,
        exact=plan.exact and keeps_weights,
        forced=plan.forced if keeps_weights else None,
    )


def _write_card(plan: Plan, folder: Path, options: Options, conversion: Conversion) -> None:
    source = plan.source.name
    info = {
        "title": f"{plan.config.model_type} converted from {Path(source).name}",
        "base_model": source,
        "num_parameters": plan.num_parameters,
        "command": options.command,
        "settings": {"source": source, "dtype": options.dtype, **plan.settings},
        "notes": conversion.notes,
        "check": str(conversion.check) if conversion.check else None,
        "tags": ["hmoe"],
    }
    write_card(folder, Path(os.path.abspath(conversion.target)).name, plan.config, info)
