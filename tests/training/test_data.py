import bz2
import gzip
import json
import logging
import lzma
from itertools import islice

import datasets
import numpy as np
import pytest
import torch

from hmoe.training.arguments import DataOptions
from hmoe.training.data import build_data
from hmoe.training.documents import Split
from hmoe.training.tokenizer import train_tokenizer


WORDS = ["the", "people", "of", "our", "country", "work", "for", "peace", "and", "a", "better", "life", "in", "every"]
LENGTH = 16


def texts(number: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(3, 30))) + f" {i}" for i in range(number)]


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(texts(50), 300)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


@pytest.fixture
def warnings_of_data(monkeypatch):
    """Messages of the package's own loggers, which Transformers keeps from pytest's."""
    messages = []
    for name in ("hmoe.training.data", "hmoe.sources", "hmoe.training.tokenizer"):
        monkeypatch.setattr(
            logging.getLogger(name),
            "warning",
            lambda message, *rest: messages.append(message % rest),
        )
    return messages


def write_jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def build(tokenizer, dataset, **options):
    dataset = [dataset] if isinstance(dataset, str) else dataset
    return build_data(DataOptions(dataset=dataset, **options), tokenizer, LENGTH)


def token_stream(sequences) -> list[int]:
    return torch.cat([sequence["input_ids"] for sequence in sequences]).tolist()


def expected_stream(tokenizer, documents) -> list[int]:
    return [token for text in documents for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]


# Formats


def _jsonl(folder, documents, opener=open):
    with opener(folder, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(documents))


FORMATS = {
    "one.jsonl": _jsonl,
    "one.jsonl.gz": lambda path, docs: _jsonl(path, docs, gzip.open),
    "one.jsonl.xz": lambda path, docs: _jsonl(path, docs, lzma.open),
    "one.jsonl.bz2": lambda path, docs: _jsonl(path, docs, bz2.open),
    "one.json": lambda path, docs: path.write_text(json.dumps([{"text": text} for text in docs])),
    "one.parquet": lambda path, docs: datasets.Dataset.from_dict({"text": docs}).to_parquet(path),
    "one.csv": lambda path, docs: datasets.Dataset.from_dict({"text": docs}).to_csv(path),
    "one.txt": lambda path, docs: path.write_text("\n".join(docs) + "\n"),
    "one.txt.gz": lambda path, docs: path.write_bytes(gzip.compress("\n".join(docs).encode())),
    "saved": lambda path, docs: datasets.Dataset.from_dict({"text": docs}).save_to_disk(path),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streaming"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_tokens(tokenizer, tmp_path, name, streaming):
    documents = texts(20)
    FORMATS[name](tmp_path / name, documents)
    lines = "line" if "txt" in name else "file"
    data = build(tokenizer, str(tmp_path / name), streaming=streaming, text_documents=lines, shuffle_buffer=1)
    expected = expected_stream(tokenizer, documents)
    read = token_stream(islice(data.train, len(expected) // LENGTH))
    assert read == expected[: len(read)]
    assert len(expected) - len(read) < LENGTH


def test_zstandard_files_are_read(tokenizer, tmp_path):
    zstandard = pytest.importorskip("zstandard")
    text = "".join(json.dumps({"text": text}) + "\n" for text in texts(20))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(text.encode()))
    assert len(build(tokenizer, str(tmp_path / "a.jsonl.zst")).train) > 0


def test_folders_and_globs_are_read_in_order_of_name(tokenizer, tmp_path):
    documents = texts(12)
    (tmp_path / "deep").mkdir()
    for number in range(4):
        write_jsonl(
            tmp_path / "deep" / f"{number}.jsonl", [{"text": t} for t in documents[3 * number : 3 * number + 3]]
        )
    (tmp_path / "readme.html").write_text("not data")
    folder = token_stream(build(tokenizer, str(tmp_path)).train)
    assert folder == token_stream(build(tokenizer, str(tmp_path / "**" / "*.jsonl")).train)
    assert folder == expected_stream(tokenizer, documents)[: len(folder)]


@pytest.mark.parametrize("unit", ["file", "line", "paragraph", "separator"])
def test_text_files_are_parted_as_asked(tokenizer, tmp_path, unit):
    (tmp_path / "a.txt").write_text("=== 1 ===\none two\nthree\n\nfour\n=== 2 ===\nfive\n" * 5)
    options = {"document_separator": "^=== .* ===$"} if unit == "separator" else {"text_documents": unit}
    data = build(tokenizer, str(tmp_path / "a.txt"), **options)
    found = data.parts[0].documents
    assert found == {"file": 1, "line": 30, "paragraph": 6, "separator": 10}[unit]


# Failures


def test_a_missing_file_is_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"no file or folder '.*nothing\.txt'"):
        build(tokenizer, str(tmp_path / "nothing.txt"))
    with pytest.raises(ValueError, match="no file matches"):
        build(tokenizer, str(tmp_path / "*.txt"))
    with pytest.raises(ValueError, match="holds no file"):
        build(tokenizer, str(tmp_path))


def test_a_name_that_is_neither_here_nor_on_the_hub_says_so(tokenizer, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"'someone/data' is no file or folder here .* Hub failed: offline"):
        build(tokenizer, "someone/data")


def test_empty_files_are_counted_and_all_empty_is_refused(tokenizer, tmp_path, warnings_of_data):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"all 1 files are empty \(0 bytes\)"):
        build(tokenizer, str(tmp_path))
    (tmp_path / "full.txt").write_text(" ".join(texts(9)))
    build(tokenizer, str(tmp_path))
    assert "left out 1 of 2 files that are empty" in warnings_of_data[0]


def test_empty_documents_are_counted(tokenizer, tmp_path, warnings_of_data):
    rows = [{"text": text} for text in [*texts(9), "", None, " \n"]]
    data = build(tokenizer, write_jsonl(tmp_path / "a.jsonl", rows))
    assert data.parts[0].documents == 9
    assert any("left out 3 of 12 documents that are empty" in message for message in warnings_of_data)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_bad_utf8_is_replaced_and_counted(tokenizer, tmp_path, warnings_of_data, name):
    good = " ".join(texts(5)).encode()
    bad = b"caf\xe9 and \xff"
    lines = [good, bad] if name == "a.txt" else [b'{"text": "%s"}' % text for text in (good, bad)]
    (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
    build(tokenizer, str(tmp_path / name), text_documents="line")
    (message,) = [m for m in warnings_of_data if "UTF-8" in m]
    assert "1 of 2 documents hold bytes that are not UTF-8, replaced by U+FFFD at 2 places" in message


def test_bad_utf8_in_a_stream_is_told(tokenizer, tmp_path, warnings_of_data):
    (tmp_path / "a.txt").write_bytes(" ".join(texts(9)).encode() + b"\n\xff\xfe\n")
    data = build(tokenizer, str(tmp_path / "a.txt"), text_documents="line", streaming=True)
    list(islice(data.train, 10))
    assert any("UTF-8" in message for message in warnings_of_data)


def test_a_missing_column_names_those_there_are(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"texts": "a", "id": 1}])
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"no column 'text' \(`text_column`\), did you mean 'texts'.*'id'"):
            build(tokenizer, path, streaming=streaming)


def test_a_column_that_is_no_text_is_refused(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": ["a", "b"]}])
    with pytest.raises(ValueError, match="holds list"):
        build(tokenizer, path)


def test_a_broken_json_line_names_the_file(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": broken\n')
    with pytest.raises(ValueError, match=r"cannot read '.*a\.jsonl' as json"):
        build(tokenizer, str(tmp_path / "a.jsonl"))


def test_mixed_formats_and_unknown_endings_need_a_format(tokenizer, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(ValueError, match=r"several formats \(json, text\)"):
        build(tokenizer, str(tmp_path))
    (tmp_path / "c.data").write_text(" ".join(texts(9)))
    with pytest.raises(ValueError, match="give the entry a `format`"):
        build(tokenizer, str(tmp_path / "c.data"))
    assert len(build(tokenizer, json.dumps({"path": str(tmp_path / "c.data"), "format": "text"})).train)


def test_a_corpus_shorter_than_a_sequence_is_refused(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "the people"}])
    with pytest.raises(ValueError, match=r"holds \d+ tokens to train on, fewer than one sequence of 16"):
        build(tokenizer, path)
    with pytest.raises(ValueError, match="fill no sequence of 16"):
        build(tokenizer, path, streaming=True, validation_fraction=0.5)


def test_entries_of_a_mixture_are_checked(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts(9)])
    with pytest.raises(ValueError, match="unknown key `wieght`, did you mean `weight`"):
        build(tokenizer, json.dumps({"path": path, "wieght": 1}))
    with pytest.raises(ValueError, match="has no `weight` but others have"):
        build(tokenizer, [path, json.dumps({"path": path, "weight": 1})])
    with pytest.raises(ValueError, match="needs their `weight`s"):
        build(tokenizer, [path, path], streaming=True)


# Splits, mixtures, order


def test_validation_documents_are_never_trained_on_and_do_not_depend_on_order(tokenizer, tmp_path):
    documents = texts(200)
    sides = []
    for name, order in (("a", documents), ("b", documents[::-1])):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in order])
        data = build(tokenizer, path, validation_fraction=0.3)
        counts = [part.documents for part in data.parts]
        assert sum(counts) == 200
        sides.append(counts)
    assert sides[0] == sides[1]
    assert 40 <= sides[0][1] <= 80
    train, held_out = Split(0.3), Split(0.3, held_out=True)
    assert all(train.takes(text) != held_out.takes(text) for text in documents)


def test_streamed_and_mapped_runs_hold_out_the_same_documents(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(100)])
    mapped = build(tokenizer, path, validation_fraction=0.3).validation
    streamed = build(tokenizer, path, validation_fraction=0.3, streaming=True).validation
    assert token_stream(mapped) == token_stream(streamed)


def test_a_mixture_has_the_shares_of_its_weights(tokenizer, tmp_path):
    entries = []
    for name, weight, size in (("a", 3, 40), ("b", 1, 80)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {text}"} for text in texts(size, seed=size)])
        entries.append(json.dumps({"path": str(tmp_path / f"{name}.jsonl"), "weight": weight}))
    parts = [build(tokenizer, json.loads(entry)["path"]).train for entry in entries]
    mapped = build(tokenizer, entries).train
    own = {tuple(row["input_ids"].tolist()) for row in parts[0]}
    from_first = sum(tuple(row["input_ids"].tolist()) in own for row in mapped)
    assert from_first / len(mapped) == pytest.approx(0.75, abs=0.01)
    assert {tuple(row["input_ids"].tolist()) for row in mapped} >= {
        tuple(row["input_ids"].tolist()) for part in parts for row in part
    }
    natural = build(tokenizer, [json.loads(entry)["path"] for entry in entries]).train
    assert len(natural) == sum(map(len, parts))
    stream = build(tokenizer, entries, streaming=True).train
    first = tokenizer("a")["input_ids"][0]
    counted = sum(int((row["input_ids"] == first).sum()) for row in islice(stream, 400))
    assert counted > 0


def test_a_stream_is_the_same_for_a_seed_and_new_on_each_pass(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(40)])
    options = DataOptions(dataset=[path], streaming=True)

    def read(seed):
        return token_stream(islice(build_data(options, tokenizer, LENGTH, seed=seed).train, 200))

    assert read(1) == read(1) != read(2)
    size = len(expected_stream(tokenizer, texts(40)))
    once = read(1)
    assert len(once) > 2 * size
    assert once[:size] != once[size : 2 * size]
    assert sorted(once[:size]) == sorted(once[size : 2 * size])


def test_tokenized_data_are_kept_and_read_again(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(40)])
    first = build(tokenizer, path).train.tokenized
    tokenizer("use changes the state of a tokenizer", padding="max_length", max_length=4, truncation=True)
    again = build(tokenizer, path).train.tokenized
    assert first.cache_files and again.cache_files == first.cache_files


def test_tokenizing_in_processes_gives_the_same_data(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(40)])
    alone = token_stream(build(tokenizer, path).train)
    cache = str(tmp_path / "cache")
    assert token_stream(build(tokenizer, path, preprocessing_workers=2, data_cache_dir=cache).train) == alone


def test_instruction_data_are_padded_cut_and_counted(tokenizer, tmp_path, warnings_of_data):
    short = [{"role": "user", "content": "the people?"}, {"role": "assistant", "content": "work for peace"}]
    long = [{"role": "user", "content": "work " * 50}, {"role": "assistant", "content": "peace"}]
    cut = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "peace " * 50}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": m} for m in ([short] * 3 + [long, cut])])
    data = build_data(DataOptions(dataset=[path], task="instruct"), tokenizer, 32)
    assert len(data.train) == 4
    assert any("left out 1 of 5 conversations without an answer" in m for m in warnings_of_data)
    assert any("cut 1 of 4 conversations" in m for m in warnings_of_data)
    batch = data.collate([dict(data.train[0]), dict(data.train[3])])
    assert batch["input_ids"].shape == (2, 32)
    assert (batch["labels"][0][batch["attention_mask"][0] == 0] == -100).all()
    with pytest.raises(ValueError, match="no column 'chats'"):
        build_data(DataOptions(dataset=[path], task="instruct", messages_column="chats"), tokenizer, 32)
