"""Reading and writing checkpoints one tensor at a time, so that memory does not grow with the model.

The reader opens a file for one tensor only, because pages of a mapped file count as used memory while it is open. The
writer appends tensors to a safetensors file behind a header of fixed size that it fills in at the end.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ..sources import local_path, not_found


SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_HEADER_BYTES = 1 << 17  # about a thousand tensors; a shard that would need more is closed
_INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_FILE_NAMES = ("model.safetensors", "pytorch_model.bin")


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
        if (download / _INDEX_NAMES[0]).exists():
            return fetch("model*.safetensors")
        if (fetch(_FILE_NAMES[0]) / _FILE_NAMES[0]).exists():
            return download
        return fetch("pytorch_model*.bin")
    except OSError as error:
        raise not_found(source, error) from error


class CheckpointReader:
    """The tensors of a checkpoint folder by name, in one file or many, safetensors or `pytorch_model*.bin`.

    `.bin` files are read with `weights_only=True`: nothing in them is executed. `used` collects the names that were
    asked for.

    Raises:
        ValueError: no weights, a missing or broken file, a missing tensor; the message names it.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.used: set[str] = set()
        self._open_bin: tuple[Path, dict[str, Tensor]] | None = None
        self._file_of: dict[str, Path] = {}
        for path, listed in self._find_files().items():
            names = self._names_in(path)
            if missing := sorted(set(listed) - set(names)):
                raise ValueError(f"{path} lacks `{missing[0]}`, which the index lists: download or copy it again")
            self._file_of.update(dict.fromkeys(listed or names, path))

    def _find_files(self) -> dict[Path, list[str]]:
        """Files of the checkpoint with the tensors that an index lists in them (none without an index)."""
        for index_name, file_name in zip(_INDEX_NAMES, _FILE_NAMES):
            if (self.folder / file_name).is_file():
                return {self.folder / file_name: []}
            if (self.folder / index_name).is_file():
                files: dict[Path, list[str]] = {}
                for name, file in json.loads((self.folder / index_name).read_text())["weight_map"].items():
                    files.setdefault(self.folder / file, []).append(name)
                for path in files:
                    if not path.is_file():
                        raise ValueError(f"{path} is missing, but {index_name} lists it: download or copy it again")
                return files
        raise ValueError(f"{self.folder} holds no weights: expected one of {', '.join((*_FILE_NAMES, *_INDEX_NAMES))}")

    def _names_in(self, path: Path) -> list[str]:
        if path.suffix == ".bin":
            return list(self._load_bin(path))
        try:
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        except SafetensorError as error:
            raise _broken(path, error) from error

    def _load_bin(self, path: Path) -> dict[str, Tensor]:
        if self._open_bin is None or self._open_bin[0] != path:
            self._open_bin = None
            try:
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
                raise _broken(path, error) from error
            self._open_bin = (path, tensors)
        return self._open_bin[1]

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> list[str]:
        return sorted(self._file_of)

    @property
    def num_bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(path.stat().st_size for path in set(self._file_of.values()))

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        """One tensor, or its entry `index` along the first dimension, in memory of its own."""
        if name not in self._file_of:
            raise ValueError(
                f"{self.folder} lacks the tensor `{name}`, which its config.json asks for: the checkpoint is "
                "incomplete or of another model"
            )
        self.used.add(name)
        path = self._file_of[name]
        if path.suffix == ".bin":
            stored = self._load_bin(path)[name]
            return (stored if index is None else stored[index]).clone()
        try:
            with safe_open(path, framework="pt") as file:
                return (file.get_tensor(name) if index is None else file.get_slice(name)[index]).clone()
        except SafetensorError as error:
            raise _broken(path, error) from error

    def dtype(self, name: str) -> torch.dtype:
        path = self._file_of[name]
        if path.suffix == ".bin":
            return self._load_bin(path)[name].dtype
        with safe_open(path, framework="pt") as file:
            stored = file.get_slice(name).get_dtype()
        for dtype, spelling in SAFETENSORS_DTYPES.items():
            if spelling == stored:
                return dtype
        raise ValueError(f"{path}: `{name}` has the data type {stored}, which this reads not: dequantize it first")

    def unused(self) -> list[str]:
        """Names that nothing asked for; rotary frequencies, which old checkpoints carry, do not count."""
        return [name for name in self.names if name not in self.used and not name.endswith("rotary_emb.inv_freq")]


def _broken(path: Path, error: Exception) -> ValueError:
    kind = "a PyTorch file of plain tensors" if path.suffix == ".bin" else "safetensors"
    size = path.stat().st_size if path.exists() else 0
    return ValueError(f"{path} ({size} bytes) is truncated, corrupt or not {kind}: {error}. Download or copy it again")


class CheckpointWriter:
    """Appends tensors to safetensors files in `folder`; memory holds no more than the tensor being written.

    Use as a context manager; leaving it without an exception finishes the files and writes the index.

    Args:
        max_shard_bytes: a new file begins where the current one would grow beyond it.
        total_bytes: expected size of all tensors, for the progress bar.
        progress: show the bar; None shows it on a terminal only.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        max_shard_bytes: int = 5 * 10**9,
        total_bytes: int | None = None,
        progress: bool | None = None,
    ):
        self.folder = Path(folder)
        self.max_shard_bytes = max_shard_bytes
        self.num_bytes = 0
        self._shards: list[dict[str, dict]] = []
        self._file: BinaryIO | None = None
        self._data_bytes = self._header_bytes = 0  # of the current shard
        disable = None if progress is None else not progress
        self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc="converting", disable=disable)

    def write(self, name: str, tensor: Tensor) -> None:
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        num_bytes = data.numel()
        header_bytes = len(name) + 24 * tensor.dim() + 128  # at least what the entry takes
        full = self._data_bytes and self._data_bytes + num_bytes > self.max_shard_bytes
        if self._file is None or full or self._header_bytes + header_bytes > _HEADER_BYTES:
            self._begin_shard()
        assert self._file is not None
        self._shards[-1][name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._data_bytes, self._data_bytes + num_bytes],
        }
        self._file.write(data.numpy().data)
        self._data_bytes += num_bytes
        self._header_bytes += header_bytes
        self.num_bytes += num_bytes
        self._bar.update(num_bytes)

    def _begin_shard(self) -> None:
        self._end_shard()
        self._shards.append({})
        self._data_bytes, self._header_bytes = 0, 64
        self._file = open(self._partial_path(len(self._shards)), "wb")  # noqa: SIM115 (closed by _end_shard)
        self._file.write(b"\0" * (8 + _HEADER_BYTES))

    def _end_shard(self) -> None:
        if self._file is None:
            return
        self._file.seek(0)
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._shards[-1]}, separators=(",", ":")).encode()
        self._file.write(_HEADER_BYTES.to_bytes(8, "little") + header.ljust(_HEADER_BYTES))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None

    def _partial_path(self, number: int) -> Path:
        return self.folder / f"shard-{number}.partial"

    def finish(self) -> None:
        """Names the files as Transformers expects them and writes the index."""
        self._end_shard()
        count = len(self._shards)
        weight_map = {}
        for number, shard in enumerate(self._shards, start=1):
            file_name = f"model-{number:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
            os.replace(self._partial_path(number), self.folder / file_name)
            weight_map.update(dict.fromkeys(shard, file_name))
        if count > 1:
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / _INDEX_NAMES[0]).write_text(json.dumps(index, indent=2) + "\n")

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._bar.close()
        if kind is None:
            self.finish()
        elif self._file is not None:
            self._file.close()


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
    if final.exists():
        replaced = final.with_name(f"{final.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
        os.rename(partial, final)
        shutil.rmtree(replaced)
    else:
        os.rename(partial, final)
