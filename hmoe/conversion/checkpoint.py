"""Reading and writing safetensors checkpoints, so that memory does not grow with the model.

The reader opens a file for one tensor only, because pages of a mapped file count as used memory while it is open. The
writer keeps the tensors of one file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME as INDEX
from transformers.utils import SAFE_WEIGHTS_NAME as WEIGHTS

from ..sources import local_path, not_found
from .families import load_source_config


SHARD_BYTES = 1 << 28


def resolve_source(source: str | os.PathLike) -> Path:
    """The folder of a checkpoint: `source` itself, or the download of that repository of the Hugging Face Hub."""
    folder = local_path(source)
    if folder is not None:
        if not folder.is_dir():
            raise ValueError(f"{folder} is a file: give the folder that holds config.json and the weights")
        return folder

    def fetch(*patterns: str) -> Path:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=list(patterns)))

    try:
        # The smallest files first: they say which weights to fetch, where a repository holds them in several formats.
        download = fetch("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")
        return fetch("model*.safetensors") if (download / INDEX).exists() else fetch(WEIGHTS)
    except OSError as error:
        raise not_found(source, error) from error


class CheckpointReader:
    """The tensors of a checkpoint folder by name, in one safetensors file or many.

    Attributes:
        used: names that were asked for.

    Raises:
        ValueError: no weights, a missing or broken file, a missing tensor; the message names it.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.used: set[str] = set()
        self._file_of = self._find_tensors()

    def _find_tensors(self) -> dict[str, Path]:
        """The file of each tensor."""
        if (path := self.folder / WEIGHTS).is_file():
            return dict.fromkeys(_names_in(path), path)
        if (self.folder / INDEX).is_file():
            weight_map = json.loads((self.folder / INDEX).read_text())["weight_map"]
            stored = {file: _names_in(self.folder / file) for file in sorted(set(weight_map.values()))}
            for name, file in weight_map.items():
                if name not in stored[file]:
                    path = self.folder / file
                    raise ValueError(f"{path} lacks `{name}`, which {INDEX} lists: download or copy it again")
            return {name: self.folder / file for name, file in weight_map.items()}
        if pickles := sorted(path.name for path in self.folder.glob("*.bin*")):
            raise ValueError(
                f"{self.folder} holds its weights as pickles ({pickles[0]}), which are not read: save them as "
                "safetensors first, AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
            )
        raise ValueError(f"{self.folder} holds no weights: expected {WEIGHTS} or {INDEX}")

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> list[str]:
        return sorted(self._file_of)

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        """One tensor, or its entry `index` along the first dimension, in memory of its own."""
        if name not in self._file_of:
            raise ValueError(
                f"{self.folder} lacks the tensor `{name}`, which its config.json asks for: the checkpoint is "
                "incomplete or of another model"
            )
        self.used.add(name)
        with _open(self._file_of[name]) as file:
            return (file.get_tensor(name) if index is None else file.get_slice(name)[index]).clone()


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A safetensors file; ValueError with its path if it is missing or broken."""
    if not path.is_file():
        raise ValueError(f"{path} is missing, but {INDEX} lists it: download or copy it again")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is truncated, corrupt or not safetensors: {error}. Download or "
            "copy it again"
        ) from error


def _names_in(path: Path) -> set[str]:
    with _open(path) as file:
        return set(file.keys())


class SourceCheckpoint(CheckpointReader):
    """A checkpoint to convert.

    Attributes:
        name: a folder or a name on the Hub, as the user gave it.
        config: its config.

    Raises:
        ValueError: if it is not there, is damaged, or its model type is not one that `command` reads.
    """

    def __init__(self, name: str | os.PathLike, model_types: Collection[str], command: str):
        folder = resolve_source(name)
        self.name = str(name)
        self.config: Any = load_source_config(folder, model_types, command)
        super().__init__(folder)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the input embedding."""
        name = "model.embed_tokens.weight"
        return self.tensor(next((stored for stored in self.names if name.endswith(stored)), name), 0).dtype

    def refuse_unused(self) -> None:
        """Raises ValueError if a tensor was not asked for. A copy of tied embeddings and rotary frequencies, which old
        checkpoints carry, do not count."""
        spare = ("rotary_emb.inv_freq", *(["lm_head.weight"] if self.config.tie_word_embeddings else []))
        if unused := [name for name in self.names if name not in self.used and not name.endswith(spare)]:
            more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
            raise ValueError(
                f"{self.folder} holds tensors that its config.json does not ask for: {', '.join(unused[:5])}{more}. "
                "They would be lost: the model is of another kind, or its config is wrong"
            )


def write_checkpoint(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    total_bytes: int | None = None,
    progress: bool | None = None,
) -> int:
    """Writes tensors into safetensors files of about `SHARD_BYTES`; memory holds those of one file.

    Args:
        tensors: their names and they, taken one by one.
        total_bytes: expected size of all tensors, for the progress bar.
        progress: show the bar; None shows it on a terminal only.

    Returns:
        The bytes of all tensors.
    """
    num_bytes = 0
    shards: list[tuple[Path, list[str]]] = []
    disable = None if progress is None else not progress
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="converting", disable=disable) as bar:
        for shard in _cut(tensors, bar):
            path = folder / f"shard-{len(shards)}.partial"
            save_file(shard, path, metadata={"format": "pt"})
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            shards.append((path, list(shard)))
            num_bytes += sum(tensor.nbytes for tensor in shard.values())
    weight_map = {}
    for number, (path, names) in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else WEIGHTS
        os.replace(path, folder / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return num_bytes


def _cut(tensors: Iterable[tuple[str, Tensor]], bar: tqdm) -> Iterator[dict[str, Tensor]]:
    """The tensors in runs of at most `SHARD_BYTES`; a run is emptied before the next is taken."""
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if shard and sum(other.nbytes for other in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard.clear()
        if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone(memory_format=torch.contiguous_format)  # no part of a larger one is kept or written
        shard[name] = tensor.detach()
        bar.update(tensor.nbytes)
    if shard:
        yield shard


@contextmanager
def output_folder(target: str | os.PathLike, source: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `target` to write into, renamed to `target` when the block ends without an exception.

    A killed process leaves only `TARGET.incomplete`, which the next conversion to `target` removes; write config.json
    last, for without it that folder does not load.

    Raises:
        ValueError: `target` exists and may not be replaced, or it is or holds the source.
    """
    final = Path(os.path.abspath(target))
    origin = Path(source).resolve()
    if final.resolve() == origin or final.resolve() in origin.parents:
        raise ValueError(f"TARGET {target} is, or holds, the source {source}: give another folder")
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        if not overwrite:
            raise ValueError(f"{target} exists: give another folder, or --overwrite to replace it")
        if not (final / "config.json").is_file():
            raise ValueError(f"{target} exists and is no checkpoint (no config.json): it is not replaced, remove it")
    partial = final.with_name(f"{final.name}.incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    replaced = final.with_name(f"{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        os.rename(final, replaced)
    os.rename(partial, final)
    shutil.rmtree(replaced, ignore_errors=True)
