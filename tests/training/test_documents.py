import pytest

from hmoe.training.documents import Split, TextEncoder
from hmoe.training.tokenizer import train_tokenizer


TEXTS = ["the people of our country work for peace", "a better life in every state"] * 20


def test_copies_of_a_document_are_all_held_out_or_none():
    documents = [f"document {number}" for number in range(200)]
    train, held_out = Split(0.3), Split(0.3, held_out=True)
    assert all(train.takes(text) != held_out.takes(text) for text in documents)
    assert 40 <= sum(map(held_out.takes, documents)) <= 80


def test_a_document_ends_with_eos_and_an_empty_one_has_no_token():
    tokenizer = train_tokenizer(TEXTS, 300)
    columns = TextEncoder(tokenizer, "content")({"content": ["the people", None, "a \ufffd life"]})
    ids = [tokenizer(text)["input_ids"] for text in ("the people", "a \ufffd life")]
    assert [row.tolist() for row in columns["input_ids"]] == [
        [*ids[0], tokenizer.eos_token_id],
        [],
        [*ids[1], tokenizer.eos_token_id],
    ]
    assert columns["bad"] == [0, 0, 1]


def test_a_tokenizer_without_end_is_refused():
    plain = train_tokenizer(TEXTS, 300)
    plain.eos_token = None
    with pytest.raises(ValueError, match="no EOS"):
        TextEncoder(plain)
