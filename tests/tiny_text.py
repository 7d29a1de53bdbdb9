"""A tokenizer of 80 words and a folder of small texts, for tests of whole runs."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = [f"w{i}" for i in range(80)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]  # ids 0 to 3, as in `distributed.tiny_model`


def write_tokenizer(folder: Path) -> None:
    """Adds tokenizer files of a word-level vocabulary of 84 to a model's folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)


def write_texts(folder: Path, files: int = 40, longest: int = 150) -> Path:
    """Files of 3 to `longest` words; the next word depends on the last one, so that there is something to learn."""
    generator = random.Random(7)
    folder.mkdir(parents=True)
    for number in range(files):
        words, word = [], generator.randrange(80)
        for _ in range(generator.randrange(3, longest)):
            word = (3 * word + generator.choice((1, 1, 1, 5, 17))) % 80
            words.append(WORDS[word])
        (folder / f"{number:02d}.txt").write_text(" ".join(words))
    return folder
