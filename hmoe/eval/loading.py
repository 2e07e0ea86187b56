"""The models that `hmoe analyze` reads: whole checkpoints, PEFT adapters on one, those with code of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hmoe  # noqa: F401  (registers the model type)
from hmoe.sources import load_checkpoint, without_progress_bars


@dataclass(frozen=True)
class Checkpoint:
    """A model: a folder or Hub id, and a PEFT adapter to put on it.

    Its loading methods raise `ValueError`, with the source and the reason, for what cannot be loaded.

    Attributes:
        trust_remote_code: whether it may run code of its own.
    """

    model: str
    adapter: str | None = None
    trust_remote_code: bool = False

    @property
    def path(self) -> str:
        """What tells checkpoints of one run apart."""
        return self.adapter or self.model

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def step(self) -> int | None:
        """The training step: as trainer_state.json says, or the folder's name, such as `checkpoint-600`."""
        state = Path(self.path) / "trainer_state.json"
        if state.is_file():
            return json.loads(state.read_text(encoding="utf-8")).get("global_step")
        match = re.search(r"(?:checkpoint|step)[-_]?(\d+)$", self.name)
        return int(match[1]) if match else None

    def tokenizer(self) -> Any:
        return self._load(AutoTokenizer, "tokenizer")

    def context(self) -> int:
        """The model's longest sequence, 512 if it names none."""
        config = self._load(AutoConfig, "config")
        return getattr(config.get_text_config(), "max_position_embeddings", None) or 512

    def network(self, dtype: str, device: str | None) -> Any:
        """The model, ready to be evaluated, its adapter on it.

        Args:
            dtype: of the weights, the name of a torch dtype.
            device: default cuda where there is one, else cpu.
        """
        torch_dtype = getattr(torch, dtype, None)
        if not isinstance(torch_dtype, torch.dtype):
            raise ValueError(f"`dtype` must name a torch dtype such as float32 or bfloat16, got {dtype!r}")
        with without_progress_bars():
            network = self._load(AutoModelForCausalLM, "model", dtype=torch_dtype)
            if self.adapter is not None:
                load = partial(_with_adapter, network)
                network = load_checkpoint(load, self.adapter, f"PEFT adapter of {self.model}")
        return network.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()

    def _load(self, auto_class: Any, what: str, **options: Any) -> Any:
        options["trust_remote_code"] = self.trust_remote_code
        return load_checkpoint(auto_class.from_pretrained, self.model, what, **options)


def _with_adapter(network: Any, adapter: str) -> Any:
    from peft import PeftModel  # of an extra

    try:
        return PeftModel.from_pretrained(network, adapter)
    except RuntimeError as error:  # tensors of another shape
        raise ValueError(str(error).strip().splitlines()[0]) from error


def is_adapter(folder: str) -> bool:
    """Whether a folder holds a PEFT adapter and no whole model."""
    return Path(folder, "adapter_config.json").is_file() and not Path(folder, "config.json").is_file()


def find_checkpoints(
    model: str, adapter: str | None, baseline: str | None, checkpoints: Sequence[str], trust_remote_code: bool = False
) -> tuple[Checkpoint, Checkpoint | None, list[Checkpoint]]:
    """The model, its baseline and its earlier checkpoints, which may be adapters if `adapter` is given.

    Raises:
        ValueError: for an adapter where a whole model belongs.
    """
    for role, folder in (("model", model), ("baseline", baseline)):
        if folder is not None and is_adapter(folder):
            remedy = "give its base model there, and the adapter as --peft" if role == "model" else "merge it first"
            raise ValueError(f"{folder} is a PEFT adapter, not a whole {role}: {remedy}")
    adapters = [folder for folder in checkpoints if is_adapter(folder)]
    if adapters and adapter is None:
        raise ValueError(f"{adapters[0]} is a PEFT adapter: give the last adapter of its run as --peft")

    def found(folder: str, adapter: str | None = None) -> Checkpoint:
        return Checkpoint(folder, adapter, trust_remote_code)

    earlier = [found(model, folder) if folder in adapters else found(folder) for folder in checkpoints]
    return found(model, adapter), None if baseline is None else found(baseline), earlier


def check_same_tokenizer(first: Any, second: Any, names: tuple[str, str]) -> None:
    """Refuses to compare losses and routes of models that read a text as different tokens.

    Raises:
        ValueError: if a token has another id in the two vocabularies.
    """
    ours, theirs = first.get_vocab(), second.get_vocab()
    probe = "The 1st token, naïve & re-tokenised:\n  x = 3.14"
    if ours == theirs and first(probe)["input_ids"] == second(probe)["input_ids"]:
        return
    different = sum(theirs.get(token) != token_id for token, token_id in ours.items())
    raise ValueError(
        f"{names[0]} ({len(ours)} tokens) and {names[1]} ({len(theirs)} tokens) have different tokenizers: "
        f"{different} tokens of the first have another id, or none, in the second. Losses and routes per token can "
        "only be compared between models that share a tokenizer"
    )
