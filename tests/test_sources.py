"""Where checkpoints and texts come from: what is a path, what a name on the Hub, and every format read alike."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
import zipfile

import datasets
import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import AutoConfig
from transformers.utils import logging

from hmoe.sources import load_checkpoint, local_path, not_found, read_beginning, read_texts, without_progress_bars


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """An empty working folder, home and cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["owner/name", "gpt2", "owner/name-1.5_b"])
def test_what_is_not_here_may_be_a_name_on_the_hub(name, tmp_path):
    assert local_path(name) is None
    (tmp_path / name).mkdir(parents=True)
    assert local_path(name).samefile(tmp_path / name)


@pytest.mark.parametrize("name", ["a/b/", "a/b/c", "~x", "~/x", "../nosuch", "./a", "/nosuch", "a b", "a--b", "a/.."])
def test_what_cannot_be_a_name_on_the_hub_is_a_path_where_nothing_is(name):
    with pytest.raises(ValueError, match=f"{name}: no such file or folder"):
        local_path(name)


def test_a_tilde_is_the_home(tmp_path):
    (tmp_path / "home" / "model").mkdir(parents=True)
    assert local_path("~/model") == tmp_path / "home" / "model"


def test_a_folder_that_is_missing_is_called_that_before_the_hub_has_its_word(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"^runs/nosuch: no such file or folder .* the Hugging Face Hub gives none"):
        load_checkpoint(AutoConfig.from_pretrained, "runs/nosuch", "config")
    absent = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    assert "has no such repository either" in str(not_found("runs/nosuch", absent))


def test_what_cannot_be_loaded_from_a_folder_says_what_and_why(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "lama"}')
    with pytest.raises(ValueError, match=r"^model: no config could be loaded from it: .*`lama`"):
        load_checkpoint(AutoConfig.from_pretrained, "model", "config")


TEXTS = ["one two\nthree", "four", "cafe\u0301 \u4e09"]


def jsonl(texts) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def zipped(data: bytes, path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inside.txt", data)


ROWS = {
    "a.jsonl": lambda path: path.write_bytes(jsonl(TEXTS)),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl(TEXTS))),
    "a.json": lambda path: path.write_text(json.dumps([{"text": text} for text in TEXTS])),
    "a.parquet": lambda path: datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(path),
    "a.csv": lambda path: datasets.Dataset.from_dict({"text": TEXTS}).to_csv(path),
    "saved": lambda path: datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(path),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_every_format_are_the_same_texts(name, tmp_path):
    ROWS[name](tmp_path / name)
    assert list(read_texts([name])) == TEXTS


PLAIN = {
    "a.txt": lambda path, data: path.write_bytes(data),
    "a.md": lambda path, data: path.write_bytes(data),
    "a.txt.gz": lambda path, data: path.write_bytes(gzip.compress(data)),
    "a.txt.xz": lambda path, data: path.write_bytes(lzma.compress(data)),
    "a.txt.bz2": lambda path, data: path.write_bytes(bz2.compress(data)),
    "a.txt.zip": lambda path, data: zipped(data, path),
}


@pytest.mark.parametrize("name", PLAIN)
def test_text_files_come_in_pieces_that_end_with_a_line(name, tmp_path):
    text = "four\nfive\n" * 300
    PLAIN[name](tmp_path / name, text.encode())
    pieces = list(read_texts([tmp_path / name], piece=100))
    assert len(pieces) > 3 and all(piece.endswith("\n") for piece in pieces) and "".join(pieces) == text


def test_an_entry_may_name_its_column_and_format(tmp_path):
    (tmp_path / "rows").write_text('{"body": "one"}\n')
    assert list(read_texts(['{"path": "rows", "format": "json", "text_column": "body"}'])) == ["one"]


def test_the_beginning_of_rows_has_them_on_lines_of_their_own(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["one", "two", "three"]))
    (tmp_path / "a.txt").write_text("one\ntwo\nthree")
    assert read_beginning("a.jsonl", 100) == read_beginning("a.txt", 100) == "one\ntwo\nthree"
    assert read_beginning("a.txt", 5) == "one\nt"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"text": "fine"}\n{"question": "no text"}\n',
            "a.jsonl, row 2: no text in column 'text' but None; columns: ['text', 'question']",
        ),
        ('{"text": 17}\n', "a.jsonl, row 1: no text in column 'text' but 17"),
        ('{"texts": "a"}\n', "a.jsonl, row 1: no text in column 'text' but None; columns: ['texts']"),
        ('{"text": "a"\n', "cannot read 'a.jsonl': JSON parse error"),
        ("", "all 1 files are empty"),
    ],
)
def test_rows_that_hold_no_text_are_refused_with_file_and_row(content, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError) as refused:
        list(read_texts(["a.jsonl"]))
    assert message in str(refused.value)


def test_text_files_need_no_extra(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    code = (
        "import sys; sys.modules['datasets'] = None; from hmoe.sources import read_beginning as read; "
        "print(read('a.txt', 9)); read('a.jsonl', 9)"
    )
    (tmp_path / "a.jsonl").write_bytes(jsonl(["words"]))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "words\n" and "ModuleNotFoundError" in done.stderr


def test_progress_bars_are_shown_again():
    shown = logging.is_progress_bar_enabled()
    with pytest.raises(KeyError), without_progress_bars():
        assert not logging.is_progress_bar_enabled()
        raise KeyError
    assert logging.is_progress_bar_enabled() == shown
