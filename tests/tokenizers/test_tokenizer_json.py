"""Our SentencePiece model as tokenizer.json gives the same ids in the package that reads it."""

from __future__ import annotations

import random

import pytest
from ar_tokenizers.text import ModelType, TextTokenizer
from ar_tokenizers.tokenizer_json import to_tokenizer_json

import tokenizers

CORPUS = [
    f"{who} {does} {count} {colour} stars,\n\tthen {count * 7} more; naïve café №{count} 星{count}星"
    for who in ("Anna", "the red dishwasher", "everybody")
    for does in ("counts", "recounted", "draws")
    for colour in ("red", "reddish", "blue")
    for count in (1, 12, 305)
]


def texts() -> list[str]:
    rng = random.Random(3)
    letters = "abcdersthnoui  \n\t.,;0123456789éï星\U0001f9ee\0<>"
    drawn = ["".join(rng.choice(letters) for _ in range(rng.randrange(40))) for _ in range(400)]
    words = [" ".join(rng.sample(" ".join(CORPUS).split(" "), 12)) for _ in range(100)]
    return [*drawn, *words, *CORPUS[:5], "", " ", "  two  spaces "]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_ids_and_texts_are_the_same(kind: ModelType) -> None:
    ours = TextTokenizer.train(CORPUS, 420, model_type=kind)
    theirs = tokenizers.Tokenizer.from_str(to_tokenizer_json(ours, ["<bos>", "<image_0>"]))
    assert theirs.get_vocab_size() == ours.size + 2 and theirs.token_to_id("<image_0>") == ours.size + 1
    for text in texts():
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == ours.encode(text), text
        assert theirs.decode(ids, skip_special_tokens=False) == text
    assert any(len(ours.encode(text)) < len(text) * 0.7 for text in CORPUS)  # pieces of several letters were needed


def test_names_that_are_pieces_are_refused() -> None:
    ours = TextTokenizer.train(CORPUS, 420)
    with pytest.raises(ValueError, match="not also text pieces, found 'e'"):
        to_tokenizer_json(ours, ["e"])
