"""Where checkpoints and documents come from: folders and files here, or the Hugging Face Hub.

A name is a path if something is there; otherwise it may be a name on the Hub. `~` is the user's home.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.utils import infer_compression
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from .errors import did_you_mean


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
Loaded = TypeVar("Loaded")


def local_path(source: str | os.PathLike) -> Path | None:
    """The file or folder that `source` names; None if nothing is there and it may be a name on the Hub.

    Raises:
        ValueError: nothing is there, and the Hub has no such names.
    """
    path = Path(os.path.expanduser(source))
    if path.exists():
        return path
    try:
        validate_repo_id(str(source))
    except HFValidationError:
        raise ValueError(f"{source}: no such file or folder (from {Path.cwd()})") from None
    return None


def load_checkpoint(
    load: Callable[..., Loaded], source: str | os.PathLike, what: str = "model", /, **options: Any
) -> Loaded:
    """`load(folder or name, **options)`, where `load` is `from_pretrained` of an Auto class.

    Raises:
        ValueError: with the source and the reason, for what cannot be loaded; `what` names it.
    """
    path = local_path(source)
    try:
        return load(str(path or source), **options)
    except (OSError, ValueError, KeyError) as error:
        if path is None and isinstance(error, OSError):
            raise not_found(source, error) from error
        if "trust_remote_code" in str(error) and not options.get("trust_remote_code"):
            raise ValueError(
                f"{source} has code of its own: --trust_remote_code runs it, if you trust its authors"
            ) from error
        raise ValueError(f"{source}: no {what} could be loaded from it: {error}") from error


def not_found(source: str | os.PathLike, error: Exception) -> ValueError:
    """For what is not here and was asked of the Hub, which answered with `error`."""
    if RepositoryNotFoundError in (type(error), type(error.__cause__)):
        answer = "has no such repository either (a private one needs `hf auth login`)"
    else:
        answer = f"gives none: {str(error).strip().splitlines()[0]}"
    return ValueError(f"{source}: no such file or folder (from {Path.cwd()}), and the Hugging Face Hub {answer}")


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hides the bars of Transformers and the Hub, which are a setting of the whole process, for a block."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


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
                hint = did_you_mean(key, known, otherwise=".")
                raise ValueError(f"`dataset` entry {entry!r}: unknown key `{key}`{hint} Keys: {', '.join(known)}")
        if "path" not in values:
            raise ValueError(f"`dataset` entry {entry!r} lacks `path`")
        source = cls(**values)
        if source.weight is not None and not source.weight > 0:
            raise ValueError(f"`dataset` entry {entry!r}: `weight` must be above 0")
        return source

    @property
    def is_on_hub(self) -> bool:
        return _resolve(self)[0] == "hub"


def load_source(
    source: Source, *, streaming: bool = False, sample_by: str = "document", cache_dir: str | None = None
) -> Any:
    """A `datasets.Dataset`, or an `IterableDataset` with `streaming`, of the raw rows.

    Args:
        sample_by: what is a row of a text file: `document` (all of it), `line` or `paragraph`.

    Raises:
        ValueError: if there is no such file or data set, all files are empty, or a file cannot be read as its format.
    """
    import datasets  # of the extras

    format_name, files = _resolve(source)
    if format_name == "saved":
        return _load_saved(source, streaming)
    if format_name == "hub":
        return _load_hub(source, streaming=streaming, cache_dir=cache_dir)
    files = _without_empty(source, files)
    settings: dict[str, Any] = {}
    if format_name == "text":
        settings = {"sample_by": sample_by, "encoding_errors": "replace"}
    elif format_name == "json":
        # Under its other name, because `datasets` parses what is called "utf-8" strictly.
        settings = {"encoding": "utf8", "encoding_errors": "replace"}
    try:
        return datasets.load_dataset(
            format_name, data_files=files, split="train", streaming=streaming, cache_dir=cache_dir, **settings
        )
    except (datasets.exceptions.DatasetGenerationError, ImportError, OSError) as error:
        cause = error.__cause__ or error
        # An ImportError says what to install; for all others it matters which files were read.
        names = "" if isinstance(cause, ImportError) else f". Files: {', '.join(files[:3])}{' ...' * (len(files) > 3)}"
        raise ValueError(f"cannot read {source.path!r} as {format_name}: {cause}{names}") from error


def read_texts(entries: Iterable[str | os.PathLike], *, piece: int = 1 << 20) -> Iterator[str]:
    """Texts of entries as `dataset` takes them, read as they are asked for.

    Text files give pieces of about `piece` characters that end with a line; of other formats each row is a text.

    Raises:
        ValueError: for what cannot be read, and for a row without text.
    """
    for source in (Source.parse(os.fspath(entry)) for entry in entries):
        format_name, files = _resolve(source)
        # Plain text is read without `datasets`, which a base install lacks.
        if format_name == "text":
            yield from _pieces(_without_empty(source, files), piece)
            continue
        column = source.text_column or "text"
        for number, row in enumerate(_stream(source), start=1):
            text = row.get(column)
            if not isinstance(text, str):
                raise ValueError(
                    f"{source.path}, row {number}: no text in column {column!r} but {text!r:.80}; columns: {list(row)}"
                )
            yield text


def _stream(source: Source) -> Iterator[dict[str, Any]]:
    try:
        yield from load_source(source, streaming=True)
    except (ValueError, OSError) as error:
        raise ValueError(f"cannot read {source.path!r}: {error}") from error


def _pieces(files: Iterable[str], piece: int) -> Iterator[str]:
    for name in files:
        if name.endswith(COMPRESSIONS) and infer_compression(name) is None:
            raise ValueError(f"{name} needs a package that reads {Path(name).suffix} files, such as `zstandard`")
        with fsspec.open(name, "rt", compression="infer", encoding="utf-8", errors="replace") as file:
            while lines := file.readlines(piece):
                yield "".join(lines)


def read_beginning(entry: str | os.PathLike, num_characters: int) -> str:
    """The first characters of the texts of an entry, one after the other."""
    text = ""
    for part in read_texts([entry]):
        text += part if not text or text.endswith("\n") else f"\n{part}"
        if len(text) >= num_characters:
            break
    return text[:num_characters]


def _resolve(source: Source) -> tuple[str, list[str]]:
    """The format of the files that a source names, and these, sorted; `hub` or `saved` (by `save_to_disk`) and none
    for a data set.

    Raises:
        ValueError: if it looks like a path and nothing is there, or the format is not known.
    """
    path = Path(os.path.expanduser(source.path))
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return "saved", []
    if path.is_file():
        files = [str(path)]
    elif path.is_dir():
        files = sorted(str(p) for p in path.rglob("*") if p.is_file() and _suffix(p) in FORMATS)
        if not files:
            raise ValueError(f"folder {source.path!r} holds no file that ends in {', '.join(FORMATS)}")
    elif glob.has_magic(str(path)):
        files = sorted(p for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not files:
            raise ValueError(f"no file matches {source.path!r} (from {Path.cwd()})")
    elif _suffix(path) in FORMATS or source.format:
        raise ValueError(f"{source.path}: no such file or folder (from {Path.cwd()})")
    else:
        local_path(source.path)  # refuses what cannot be a name on the Hub
        return "hub", []
    return _format_of(source, files), files


def _suffix(path: Path) -> str:
    suffixes = [s for s in path.suffixes if s not in COMPRESSIONS]
    return suffixes[-1] if suffixes else ""


def _format_of(source: Source, files: list[str]) -> str:
    if source.format:
        return source.format
    found = {FORMATS.get(_suffix(Path(file))) for file in files}
    if found == {None}:
        raise ValueError(
            f"the format of {files[0]!r} is not known by its name: give the entry a `format` "
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


def _load_saved(source: Source, streaming: bool) -> Any:
    import datasets

    dataset = datasets.load_from_disk(os.path.expanduser(source.path))
    if isinstance(dataset, datasets.DatasetDict):
        if source.split not in dataset:
            raise ValueError(f"{source.path!r} has no split {source.split!r}: give `split`, one of {list(dataset)}")
        dataset = dataset[source.split]
    return dataset.to_iterable_dataset(num_shards=min(64, 1 + len(dataset) // 1000)) if streaming else dataset


def _load_hub(source: Source, **options: Any) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            source.path, source.name, data_files=source.data_files, split=source.split, **options
        )
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise not_found(source.path, error) from error


def check_columns(dataset: Any, needed: Iterable[str], source: Source, option: str) -> None:
    """Raises ValueError, with the columns there are and the nearest one, if a needed one is missing."""
    names = dataset.column_names
    if names is None:  # a stream knows its columns once it has been read
        names = list(next(iter(dataset), {}))
    for column in needed:
        if column not in names:
            hint = did_you_mean(column, names, otherwise=".")
            raise ValueError(f"{source.path!r} has no column {column!r} (`{option}`){hint} Its columns: {names}")
