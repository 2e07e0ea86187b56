"""What every conversion does around its tensors: write atomically, copy what belongs along, check, describe."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save

from ..cards import write_card
from ..configuration_hmoe import HMoEConfig
from ..modeling_hmoe import HMoEForCausalLM
from .check import (
    CheckFailed,
    CheckResult,
    ForcedRouting,
    check_tokens,
    compare_logits,
    fits_in_memory,
    reference_logits,
)
from .checkpoint import CheckpointReader, CheckpointWriter, output_folder


_COPIED = [
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("*.tiktoken", "chat_template*", "additional_chat_templates", "generation_config.json", "LICENSE*", "NOTICE*"),
]


@dataclass(frozen=True)
class Options:
    """What all conversions have in common.

    Attributes:
        dtype: name of the data type to write; None keeps the source's.
        max_shard_bytes: largest weights file.
        overwrite: replace an existing checkpoint at the target, at the very end.
        check: compare the logits of source and target before the target appears.
        check_text: a text file for the check; None takes a speech.
        command: the arguments of `hmoe` that asked for this, for the model card.
        progress: show a progress bar; None shows it on a terminal only.
    """

    dtype: str | None = None
    max_shard_bytes: int = 5 * 10**9
    overwrite: bool = False
    check: bool = True
    check_text: str | None = None
    command: Sequence[str] | None = None
    progress: bool | None = None


@dataclass
class Plan:
    """A conversion that is ready to be written.

    Attributes:
        tensors: called once, yields the names and tensors of the target in the order in which they are written.
        exact: the target's logits equal the source's.
        forced: a routing under which they do, for targets that are not exact with their own router.
        settings: arguments of the conversion, for the model card.
        notes: what a reader of the card must know; printed too.
    """

    source: Path
    reader: CheckpointReader
    config: PreTrainedConfig
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    num_parameters: float
    exact: bool
    settings: Mapping[str, Any]
    forced: ForcedRouting | None = None
    notes: list[str] = field(default_factory=list)


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


def execute(plan: Plan, source: str, target: str | Path, options: Options) -> Conversion:
    """Writes the target, whole or not at all.

    Raises:
        ValueError: a broken source, a target that may not be replaced, or tensors that the conversion did not expect.
        CheckFailed: the logits should be equal and are not; nothing is left at the target.
    """
    with output_folder(target, plan.source, overwrite=options.overwrite) as folder:
        dtype = plan.config.dtype or torch.float32
        total_bytes = int(plan.num_parameters * dtype.itemsize)
        with CheckpointWriter(
            folder, max_shard_bytes=options.max_shard_bytes, total_bytes=total_bytes, progress=options.progress
        ) as writer:
            for name, tensor in plan.tensors():
                writer.write(name, tensor)
        _refuse_unused(plan)
        copy_companions(plan.source, folder)
        if isinstance(plan.config, HMoEConfig):
            custom_object_save(HMoEForCausalLM, folder)
            plan.config.architectures = plan.config.architectures or [HMoEForCausalLM.__name__]
        notes = list(plan.notes)
        check = _check(plan, folder, options, notes)
        if check is not None and not check.passed:
            raise CheckFailed(
                f"{check}. These should be equal; nothing was written to {target}. Please report it with the model; "
                "--no_check skips this check"
            )
        conversion = Conversion(Path(target), plan.config, writer.num_bytes, check, tuple(notes))
        _write_card(plan, source, folder, options.command, conversion)
        plan.config.save_pretrained(folder)  # last: until now the folder does not load
    return conversion


def _refuse_unused(plan: Plan) -> None:
    expected = {"lm_head.weight"} if plan.config.tie_word_embeddings else set()
    if unused := [name for name in plan.reader.unused() if name not in expected]:
        more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
        raise ValueError(
            f"{plan.source} holds tensors that its config.json does not ask for: {', '.join(unused[:5])}{more}. "
            "They would be lost: the model is of another kind, or its config is wrong"
        )


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, chat templates, generation config and licence, as they are."""
    for pattern in _COPIED:
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, folder / path.name)


def _check(plan: Plan, folder: Path, options: Options, notes: list[str]) -> CheckResult | None:
    if not options.check:
        return None
    if not fits_in_memory(plan.num_parameters):
        notes.append(f"not checked: {plan.num_parameters / 1e9:.1f} B parameters in fp32 do not fit into free memory")
        return None
    tokens, text = check_tokens(plan.source, plan.config.vocab_size, options.check_text)
    source_logits = reference_logits(plan.source, tokens)
    return compare_logits(source_logits, folder, plan.config, tokens, text=text, exact=plan.exact, forced=plan.forced)


def _write_card(plan: Plan, source: str, folder: Path, command: Sequence[str] | None, conversion: Conversion) -> None:
    name = Path(os.path.abspath(conversion.target)).name
    info = {
        "title": f"{plan.config.model_type} converted from {Path(source).name}",
        "base_model": source,
        "num_parameters": int(plan.num_parameters),
        "command": command,
        "settings": plan.settings,
        "notes": conversion.notes,
        "check": str(conversion.check) if conversion.check else None,
        "tags": ["hmoe"],
    }
    write_card(folder, name, plan.config, info)
