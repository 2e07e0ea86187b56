from hmoe.eval.observe import batches, windows
from hmoe.sources import read_texts


def test_windows_are_cut_from_one_stream_and_documents_end_with_eos(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n\n{"text": "three"}\n')
    (tmp_path / "b.txt").write_text("four\nfive\n" * 300)
    documents = list(read_texts([tmp_path / "a.jsonl", tmp_path / "b.txt"], piece=100))
    assert documents[:2] == ["one two", "three"]
    assert len(documents) > 3 and "".join(documents[2:]) == "four\nfive\n" * 300
    expected = [token for text in documents for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    rows = list(windows(documents, tokenizer, 16))
    assert [token for row in rows for token in row] == expected[: len(expected) // 16 * 16]
    assert len(list(windows(documents, tokenizer, 16, max_tokens=50))) == 3
    assert [len(batch["input_ids"]) for batch in batches(rows[:5], 2)] == [2, 2, 1]
