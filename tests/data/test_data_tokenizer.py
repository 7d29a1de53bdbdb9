"""Loading and encoding: bare sentencepiece folders equal sentencepiece itself, BOS exactly once."""

from __future__ import annotations

import json
import random
import shutil

import pytest

from linearard.data.tokenizer import encode_documents, load_tokenizer, tokenizer_fingerprint
from linearard.errors import UserError

sentencepiece = pytest.importorskip("sentencepiece")

TEXTS = (
    "Hello world",
    "  two spaces first",
    "x",
    " ",
    "\n\nA\n",
    "naïve 中文 😀\t1234",
    "a  b   c ",
    "def f(x):\n    return  x\n",
)


@pytest.fixture(scope="session")
def train_sentencepiece(tmp_path_factory):
    """Trains a tiny sentencepiece model and gives the folder that holds only tokenizer.model."""
    words = random.Random(0)
    lines = [
        " ".join("".join(words.choices("abcdefghinorst", k=words.randint(1, 7))) for _ in range(12)) for _ in range(300)
    ]
    lines += ["Hello world def return (x): 1234567890 A  B   C"] * 20

    def train(model_type: str, **settings):
        folder = tmp_path_factory.mktemp(f"sp_{model_type}")
        defaults = {
            "vocab_size": 420,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "hard_vocab_limit": False,
            "minloglevel": 2,
        }
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_prefix=str(folder / "tokenizer"),
            model_type=model_type,
            **(defaults | settings),
        )
        (folder / "tokenizer.vocab").unlink()
        return folder

    return train


@pytest.fixture(scope="session")
def sentencepiece_folder(train_sentencepiece):
    return train_sentencepiece("bpe")


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("bpe", {}),
        ("unigram", {}),
        ("bpe", {"add_dummy_prefix": False}),
        ("unigram", {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}),
    ],
)
def test_bare_sentencepiece_folder_equals_sentencepiece(train_sentencepiece, model_type, settings):
    folder = train_sentencepiece(model_type, **settings)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = load_tokenizer(str(folder))
    for text in TEXTS:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == processor.encode(text), text
        assert tokenizer(text)["input_ids"] == [processor.bos_id(), *processor.encode(text)]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert len(tokenizer) == processor.get_piece_size()  # no token added


def test_tokenizer_survives_saving(sentencepiece_folder, tmp_path):
    tokenizer = load_tokenizer(str(sentencepiece_folder))
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"], text
    assert load_tokenizer(str(sentencepiece_folder / "tokenizer.model"))("x")["input_ids"] == again("x")["input_ids"]


def test_model_folder_with_only_a_config_beside(sentencepiece_folder, tmp_path):
    shutil.copy(sentencepiece_folder / "tokenizer.model", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    expected = load_tokenizer(str(sentencepiece_folder))("Hello world")["input_ids"]
    assert load_tokenizer(str(tmp_path))("Hello world")["input_ids"] == expected


def test_bos_and_eos_once(sentencepiece_folder):
    tokenizer = load_tokenizer(str(sentencepiece_folder))  # adds BOS by itself when it is let
    texts = ["Hello world", "<s>Hello world</s>"]
    for ids in encode_documents(tokenizer, texts, add_bos=True, add_eos=True):
        assert ids[0] == 1 and ids.count(1) == 1
        assert ids[-1] == 2 and ids.count(2) == 1
    plain = encode_documents(tokenizer, texts[:1], add_bos=False, add_eos=False)[0]
    assert 1 not in plain and 2 not in plain


def test_encoding_equals_the_tokenizers_own_call(sentencepiece_folder):
    tokenizer = load_tokenizer(str(sentencepiece_folder))
    texts = [*TEXTS, "in the <s> middle", "Hello " * 500]
    tokenizer(texts, truncation=True, max_length=3)  # leaves its settings behind
    for split_special_tokens in (False, True):
        tokenizer.split_special_tokens = split_special_tokens
        expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        tokenizer(texts, truncation=True, max_length=3)
        assert encode_documents(tokenizer, texts, add_bos=False, add_eos=False) == expected


def test_no_bos_in_the_vocabulary(train_sentencepiece):
    tokenizer = load_tokenizer(str(train_sentencepiece("bpe", bos_id=-1)))
    assert tokenizer.bos_token_id is None
    plain = tokenizer("Hello", add_special_tokens=False)["input_ids"]
    assert encode_documents(tokenizer, ["Hello"], add_bos=True, add_eos=False) == [plain]


def test_fingerprint_follows_the_pipeline_not_its_use(sentencepiece_folder, train_sentencepiece):
    tokenizer = load_tokenizer(str(sentencepiece_folder))
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a b c", "d"], truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(load_tokenizer(str(sentencepiece_folder))) == before
    other = load_tokenizer(str(train_sentencepiece("bpe", vocab_size=400)))
    assert tokenizer_fingerprint(other) != before


def test_unreadable_tokenizers(tmp_path):
    cases = {}
    for name, file, content in (
        ("empty", None, b""),
        ("garbage_model", "tokenizer.model", b"\x00garbage" * 20),
        ("garbage_json", "tokenizer.json", b'{"a":'),
        ("foreign_json", "tokenizer.json", b'{"a": 1}'),
    ):
        cases[name] = tmp_path / name
        cases[name].mkdir()
        if file:
            (cases[name] / file).write_bytes(content)
    for name, folder in {**cases, "missing": tmp_path / "missing"}.items():
        with pytest.raises(UserError, match="tokenizer") as caught:
            load_tokenizer(str(folder))
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value), name
