"""Where documents come from: local files of several formats, or the Hub, all read by `datasets`."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging

from hmoe.training.arguments import DataOptions


logger = logging.get_logger(__name__)

FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}
COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst", ".lz4", ".zip")


@dataclass
class Source:
    """One entry of `dataset`.

    Attributes:
        path: file, folder, glob or Hub name.
        weight: share of the tokens in a mixture.
        name, split, data_files: as in `datasets.load_dataset`.
        format: text, json, parquet or csv; default: by file name.
        text_column: default: that of the whole run.
    """

    path: str
    weight: float | None = None
    name: str | None = None
    split: str = "train"
    format: str | None = None
    text_column: str | None = None
    data_files: str | list[str] | None = None

    @classmethod
    def parse(cls, entry: str) -> Source:
        """A source from a path, a Hub name, or a JSON mapping of this class's fields."""
        if not entry.lstrip().startswith("{"):
            return cls(path=entry)
        try:
            values = json.loads(entry)
        except ValueError as error:
            raise ValueError(f"`dataset` entry {entry!r} is not JSON: {error}") from None
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                nearest = get_close_matches(key, known, n=1, cutoff=0.5)
                hint = f", did you mean `{nearest[0]}`?" if nearest else ""
                raise ValueError(f"`dataset` entry {entry!r}: unknown key `{key}`{hint} Keys: {', '.join(known)}")
        if "path" not in values:
            raise ValueError(f"`dataset` entry {entry!r} lacks `path`")
        source = cls(**values)
        if source.weight is not None and not source.weight > 0:
            raise ValueError(f"`dataset` entry {entry!r}: `weight` must be above 0")
        return source

    @property
    def is_on_hub(self) -> bool:
        return not _is_saved_dataset(self.path) and local_files(self) is None


def load_source(source: Source, options: DataOptions) -> Any:
    """A `datasets.Dataset`, or an `IterableDataset` with `streaming`, of the raw rows.

    Raises:
        ValueError: if there is no such file or data set, all files are empty, or a file cannot be read as its format.
    """
    if _is_saved_dataset(source.path):
        return _load_saved(source, options)
    files = local_files(source)
    if files is None:
        return _load_hub(source, options)
    format_name = source.format or _format_of(source, files)
    files = _without_empty(source, files)
    settings: dict[str, Any] = {}
    if format_name == "text":
        whole = options.document_separator is not None or options.text_documents == "file"
        settings = {"sample_by": "document" if whole else options.text_documents, "encoding_errors": "replace"}
    elif format_name == "json":
        # Under its other name, because `datasets` parses what is called "utf-8" strictly.
        settings = {"encoding": "utf8", "encoding_errors": "replace"}
    try:
        dataset = datasets.load_dataset(
            format_name,
            data_files=files,
            split="train",
            streaming=options.streaming,
            cache_dir=options.data_cache_dir,
            **settings,
        )
    except (datasets.exceptions.DatasetGenerationError, ImportError, OSError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"cannot read {source.path!r} as {format_name}: {cause}{_remedy(files, cause)}") from error
    return dataset


def local_files(source: Source) -> list[str] | None:
    """The files that a source names, sorted; None if it names a data set of the Hub.

    Raises:
        ValueError: if it looks like a path and nothing is there.
    """
    path = Path(source.path).expanduser()
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        files = sorted(str(p) for p in path.rglob("*") if p.is_file() and _suffix(p) in FORMATS)
        if not files:
            raise ValueError(f"folder {source.path!r} holds no file that ends in {', '.join(FORMATS)}")
        return files
    if glob.has_magic(str(path)):
        files = sorted(p for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not files:
            raise ValueError(f"`dataset`: no file matches {source.path!r}")
        return files
    if _suffix(path) in FORMATS or path.is_absolute() or source.path.startswith((".", "~")) or source.format:
        raise ValueError(f"`dataset`: no file or folder {source.path!r} (from {Path.cwd()})")
    return None


def _suffix(path: Path) -> str:
    suffixes = [s for s in path.suffixes if s not in COMPRESSIONS]
    return suffixes[-1] if suffixes else ""


def _format_of(source: Source, files: list[str]) -> str:
    found = {FORMATS.get(_suffix(Path(file))) for file in files}
    if found == {None}:
        raise ValueError(
            f"`dataset`: the format of {files[0]!r} is not known by its name: give the entry a `format` "
            f"({', '.join(sorted(set(FORMATS.values())))})"
        )
    if len(found) > 1:
        names = sorted(str(name) for name in found)
        raise ValueError(f"{source.path!r} holds files of several formats ({', '.join(names)}): name them apart")
    return str(found.pop())


def _without_empty(source: Source, files: list[str]) -> list[str]:
    filled = [file for file in files if Path(file).stat().st_size]
    if not filled:
        raise ValueError(f"{source.path!r}: all {len(files)} files are empty (0 bytes), such as {files[0]!r}")
    if len(filled) < len(files):
        empty = sorted(set(files) - set(filled))
        logger.warning(
            f"{source.path}: left out {len(empty)} of {len(files)} files that are empty, such as {empty[0]}"
        )
    return filled


def _remedy(files: list[str], cause: BaseException) -> str:
    if isinstance(cause, ImportError):
        return ""  # it says what to install
    return f". Files: {', '.join(files[:3])}{' ...' if len(files) > 3 else ''}"


def _is_saved_dataset(path: str) -> bool:
    return (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file()


def _load_saved(source: Source, options: DataOptions) -> Any:
    dataset = datasets.load_from_disk(source.path)
    if isinstance(dataset, datasets.DatasetDict):
        if source.split not in dataset:
            raise ValueError(f"{source.path!r} has no split {source.split!r}: give `split`, one of {list(dataset)}")
        dataset = dataset[source.split]
    return dataset.to_iterable_dataset(num_shards=min(64, 1 + len(dataset) // 1000)) if options.streaming else dataset


def _load_hub(source: Source, options: DataOptions) -> Any:
    try:
        return datasets.load_dataset(
            source.path,
            source.name,
            data_files=source.data_files,
            split=source.split,
            streaming=options.streaming,
            cache_dir=options.data_cache_dir,
        )
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"`dataset` entry {source.path!r} is no file or folder here (in {Path.cwd()}), and loading it from the "
            f"Hub failed: {error}"
        ) from error


def check_columns(dataset: Any, needed: Iterable[str], source: Source, option: str) -> None:
    """Raises ValueError, with the columns there are and the nearest one, if a needed one is missing."""
    names = dataset.column_names
    if names is None:  # a stream knows its columns once it has been read
        names = list(next(iter(dataset), {}))
    for column in needed:
        if column not in names:
            nearest = get_close_matches(column, names, n=1, cutoff=0.5)
            hint = f", did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"{source.path!r} has no column {column!r} (`{option}`){hint} Its columns: {names}")


def compile_separator(pattern: str | None) -> re.Pattern[str] | None:
    """The regular expression of the lines that part documents."""
    if pattern is None:
        return None
    try:
        return re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise ValueError(f"`document_separator`={pattern!r} is not a regular expression: {error}") from None
