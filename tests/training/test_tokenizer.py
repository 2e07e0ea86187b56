from hmoe.training.tokenizer import train_tokenizer


TEXTS = ["the people of our country work for peace", "a better life in every state"] * 20


def test_a_trained_tokenizer_gives_back_every_text():
    tokenizer = train_tokenizer(TEXTS, 300)
    text = "Grüße, 世界! \x00 \t two  spaces\r\n 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert train_tokenizer(TEXTS, 300).get_vocab() == tokenizer.get_vocab()
    assert tokenizer.unk_token is None
