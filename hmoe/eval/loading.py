"""The models that `hmoe analyze` reads: whole checkpoints, PEFT adapters on one, those with code of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hmoe  # noqa: F401  (registers the model type)
from hmoe.sources import load_checkpoint, local_path, not_found, without_progress_bars


@dataclass(frozen=True)
class Source:
    """A checkpoint: a folder or Hub id, and a PEFT adapter to put on it."""

    model: str
    adapter: str | None = None

    @property
    def path(self) -> str:
        """What tells checkpoints of one run apart."""
        return self.adapter or self.model

    @property
    def name(self) -> str:
        return Path(self.path).name


def is_adapter(folder: str) -> bool:
    """Whether a folder holds a PEFT adapter and no whole model."""
    return Path(folder, "adapter_config.json").is_file() and not Path(folder, "config.json").is_file()


def find_sources(
    model: str, adapter: str | None, baseline: str | None, checkpoints: Sequence[str]
) -> tuple[Source, Source | None, list[Source]]:
    """The model, its baseline and its earlier checkpoints, which may be adapters if `adapter` is given.

    Raises:
        ValueError: for an adapter where a whole model belongs.
    """
    for role, folder in (("model", model), ("baseline", baseline)):
        if folder is not None and is_adapter(folder):
            remedy = "give its base model there, and the adapter as --peft" if role == "model" else "merge it first"
            raise ValueError(f"{folder} is a PEFT adapter, not a whole {role}: {remedy}")
    earlier = [Source(model, folder) if is_adapter(folder) else Source(folder) for folder in checkpoints]
    adapters = [source.path for source in earlier if source.adapter]
    if adapters and adapter is None:
        raise ValueError(f"{adapters[0]} is a PEFT adapter: give the last adapter of its run as --peft")
    return Source(model, adapter), None if baseline is None else Source(baseline), earlier


@dataclass(frozen=True)
class Loader:
    """Loads what a [`Source`] names.

    Attributes:
        dtype: of the weights, the name of a torch dtype.
        device: default cuda where there is one, else cpu.
        trust_remote_code: whether checkpoints may run code of their own.

    Every method raises `ValueError`, with the source and the reason, for what cannot be loaded.
    """

    dtype: str = "float32"
    device: str | None = None
    trust_remote_code: bool = False

    def tokenizer(self, source: Source) -> Any:
        return self._load(AutoTokenizer, source, "tokenizer")

    def context(self, source: Source) -> int:
        """The model's longest sequence, 512 if it names none."""
        config = self._load(AutoConfig, source, "config")
        return getattr(config.get_text_config(), "max_position_embeddings", None) or 512

    def network(self, source: Source) -> Any:
        """The model, ready to be evaluated, its adapter on it."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"`dtype` must name a torch dtype such as float32 or bfloat16, got {self.dtype!r}")
        with without_progress_bars():
            network = self._load(AutoModelForCausalLM, source, "model", dtype=dtype)
            if source.adapter is not None:
                network = _with_adapter(network, source)
        return network.to(self.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()

    def _load(self, auto_class: Any, source: Source, what: str, **options: Any) -> Any:
        trust = self.trust_remote_code
        return load_checkpoint(auto_class.from_pretrained, source.model, what, trust_remote_code=trust, **options)


def _with_adapter(network: Any, source: Source) -> Any:
    from peft import PeftModel  # of an extra

    path = local_path(str(source.adapter))
    try:
        return PeftModel.from_pretrained(network, str(path or source.adapter))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: tensors of another shape
        if path is None and isinstance(error, OSError):
            raise not_found(str(source.adapter), error) from error
        message = f"{source.adapter}: no PEFT adapter of {source.model} could be loaded from it: "
        raise ValueError(message + str(error).strip().splitlines()[0]) from error
