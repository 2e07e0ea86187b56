import pytest

from hmoe.training.chat import ChatEncoder
from hmoe.training.tokenizer import train_tokenizer


TEXTS = ["the people of our country work for peace", "a better life in every state"] * 20


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


CHAT = [
    {"role": "user", "content": "the people?"},
    {"role": "assistant", "content": "work for peace"},
    {"role": "user", "content": "a life?"},
    {"role": "assistant", "content": "better"},
]


def answers(tokenizer, columns) -> str:
    ids = [label for label in columns["labels"][0] if label != -100]
    return tokenizer.decode(ids)


def test_only_answers_are_learned(tokenizer):
    encoded = ChatEncoder(tokenizer, 200)({"messages": [CHAT]})
    assert answers(tokenizer, encoded) == "work for peace<|im_end|>better<|im_end|>"
    assert tokenizer.decode(encoded["input_ids"][0]) == tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_a_template_without_marks_gives_the_same_answers(tokenizer):
    plain = train_tokenizer(TEXTS, 300)
    plain.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    encoded = ChatEncoder(plain, 200)({"messages": [CHAT]})
    assert answers(plain, encoded).replace("\n", "") == "work for peace<|im_end|>better<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    plain = train_tokenizer(TEXTS, 300)
    plain.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="generation"):
        ChatEncoder(plain, 200)({"messages": [CHAT]})
    plain.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        ChatEncoder(plain, 200)


def test_pairs_learn_the_answer_and_its_end(tokenizer):
    encoder = ChatEncoder(tokenizer, 200, prompt="question", answer="reply")
    encoded = encoder({"question": ["the people "], "reply": ["work"]})
    assert answers(tokenizer, encoded) == "work<|endoftext|>"
