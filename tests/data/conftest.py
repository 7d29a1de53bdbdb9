from __future__ import annotations

import pytest

BOS, EOS = 1, 2


class ByteTokenizer:
    """The smallest thing that `prepare` can use: a token per byte, counted calls."""

    bos_token_id, eos_token_id = BOS, EOS
    special_tokens_map = {"bos_token": "<s>", "eos_token": "</s>"}  # noqa: RUF012

    def __init__(self, vocabulary: int = 300) -> None:
        self.vocabulary = vocabulary
        self.calls = 0

    def __call__(self, texts, add_special_tokens=True, **_):
        assert not add_special_tokens
        self.calls += 1
        return {"input_ids": [[byte + 10 for byte in text.encode()] for text in texts]}

    def get_vocab(self):
        return {str(i): i for i in range(self.vocabulary)}


@pytest.fixture
def byte_tokenizer():
    return ByteTokenizer()


@pytest.fixture
def make_byte_tokenizer():
    return ByteTokenizer
