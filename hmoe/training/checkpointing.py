"""Checkpoints that are complete or not there.

A checkpoint is written into `tmp-checkpoint-N`, flushed to the disk, described by a manifest (size and SHA-256 of
every file) and only then renamed to `checkpoint-N`. A rename is atomic, so a process killed at any moment leaves
either the whole checkpoint under its name or none; the manifest finds what went wrong later: a truncated copy, a bad
disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from hmoe.errors import CommandError


logger = logging.getLogger(__name__)

MANIFEST = "checkpoint_manifest.json"
STAGING_PREFIX = "tmp-"
OLD_PREFIX = f"{STAGING_PREFIX}old-"
PROBE_PREFIX = f"{STAGING_PREFIX}probe-"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_STAGING = re.compile(rf"{STAGING_PREFIX}(checkpoint-\d+)")
_BLOCK = 1 << 22


class CheckpointError(CommandError):
    """A checkpoint cannot be written, or is not what its manifest says."""


def check_writable(folder: str | os.PathLike) -> None:
    """Makes `folder` and writes a file into it.

    Raises:
        CheckpointError: with the folder, the cause and the remedy, before any training is done in vain.
    """
    probe = Path(folder) / f"{PROBE_PREFIX}{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"`output_dir`={os.fspath(folder)!r} cannot be written: {error.strerror or error}. "
            "Choose another folder, or give this user the right to write there"
        ) from error


def write_manifest(folder: Path) -> None:
    """Flushes every file of `folder` to the disk and describes them all in its manifest, which is written last."""
    names = _files(folder)
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(lambda name: _digest(folder / name, flush=True), names))
    files = {name: {"size": (folder / name).stat().st_size, "sha256": digest} for name, digest in zip(names, digests)}
    _write_flushed(folder / MANIFEST, json.dumps({"files": files}, indent=1))
    for parent in {(folder / name).parent for name in [*names, MANIFEST]}:
        _flush_folder(parent)


@contextmanager
def clear_save_errors(staging: Path) -> Iterator[None]:
    """Removes a staging folder that could not be written, and says what happened and what is left."""
    try:
        yield
    except Exception as error:
        shutil.rmtree(staging, ignore_errors=True)
        free = shutil.disk_usage(staging.parent).free / 2**20 if staging.parent.is_dir() else 0.0
        raise CheckpointError(
            f"the checkpoint {staging.name.removeprefix(STAGING_PREFIX)} could not be saved in {staging.parent} "
            f"({free:,.0f} MiB free): {type(error).__name__}: {error}. Earlier checkpoints are untouched: make room "
            "or mend the folder, then resume from the last one"
        ) from error


def publish_checkpoint(staging: Path, final: Path) -> None:
    """Renames a complete `staging` to `final`; an older folder of that name goes only after it."""
    replaced = final.with_name(f"{OLD_PREFIX}{final.name}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    staging.rename(final)
    _flush_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def describe_damage(folder: str | os.PathLike) -> str | None:
    """What is wrong with a checkpoint, naming the files; None if every file is what the manifest says."""
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}: its save was cut short, or something else wrote it"
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST} is unreadable ({type(error).__name__}: {error})"
    with ThreadPoolExecutor(max_workers=4) as pool:
        damage = pool.map(lambda name: _file_damage(folder / name, files[name]), files)
        found = [f"{name} {what}" for name, what in zip(files, damage) if what]
    return "; ".join(found) or None


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Folders named `checkpoint-N`, oldest first, whole or not."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def find_last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest undamaged `checkpoint-N` of `output_dir`; None if there is none.

    Every newer one that is passed over is named in a warning together with what is broken. Nothing is changed.
    """
    for path in reversed(list_checkpoints(output_dir)):
        damage = describe_damage(path)
        if damage is None:
            return str(path)
        logger.warning("Ignoring checkpoint %s: %s", path, damage)
    return None


def resolve_checkpoint(requested: str | bool | None, output_dir: str) -> str | None:
    """The folder to resume from: the one that is named, or the newest complete one of `output_dir`.

    Args:
        requested: as `HMoETrainer.train` takes it.

    Raises:
        CheckpointError: it is damaged, all are damaged, or `requested` is True and there is none.
    """
    if not requested:
        return None
    if requested is True or requested == "auto":
        found = find_last_complete_checkpoint(output_dir)
        broken = list_checkpoints(output_dir)
        if found is None and broken:
            raise CheckpointError(
                f"none of the {len(broken)} checkpoints in `output_dir`={output_dir!r} is complete; "
                f"{broken[-1].name}: {describe_damage(broken[-1])}. Start anew in another folder, restore a "
                "checkpoint from a copy, or name the folder of one that another program wrote"
            )
        if found is None and requested is True:
            raise CheckpointError(f"there is no checkpoint in `output_dir`={output_dir!r}: start without resuming")
        return found
    damage = describe_damage(requested)
    if damage is not None and Path(requested, MANIFEST).exists():
        raise CheckpointError(
            f"checkpoint {requested} is damaged: {damage}. Resume from another one; resume_from_checkpoint=True takes "
            "the newest that is whole"
        )
    if damage is not None:
        logger.warning("Checkpoint %s cannot be checked: %s", requested, damage)
    return str(requested)


def clear_staging(output_dir: str | os.PathLike) -> None:
    """Removes what a killed save left behind; a staging folder that is complete gets its name instead.

    The latter is there if the process died between flushing a checkpoint and renaming it.
    """
    folder = Path(output_dir)
    for path in sorted(folder.glob(f"{STAGING_PREFIX}*")) if folder.is_dir() else []:
        match = _STAGING.fullmatch(path.name)
        final = folder / match[1] if match else None
        if final and not final.exists() and describe_damage(path) is None:
            path.rename(final)
        elif match or path.name.startswith((f"{OLD_PREFIX}checkpoint-", PROBE_PREFIX)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def delete_old_checkpoints(newest: Path, limit: int | None, best: str | None) -> None:
    """Deletes the oldest checkpoints beyond `limit`; never `newest`, which is complete, and never the `best`.

    Steps, not times, order them: copying a folder changes times.
    """
    if not limit or limit < 1:
        return
    protected = {newest.name, Path(best).name} if best else {newest.name}
    checkpoints = list_checkpoints(newest.parent)
    excess = len(checkpoints) - max(limit, len(protected))
    for path in [path for path in checkpoints if path.name not in protected][: max(excess, 0)]:
        # Under another name a folder that is only half deleted is taken for nothing else.
        removed = path.rename(path.with_name(f"{OLD_PREFIX}{path.name}"))
        shutil.rmtree(removed, ignore_errors=True)


def _files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST
    )


def _digest(path: Path, *, flush: bool = False) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
        if flush:
            os.fsync(file.fileno())
    return digest.hexdigest()


def _file_damage(path: Path, expected: dict) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["size"]:
            return f"has {size} of {expected['size']} bytes"
        if _digest(path) != expected["sha256"]:
            return "has other contents than when it was saved"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _write_flushed(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Makes names of new files survive a power cut; only POSIX can flush a folder."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
