"""Small text tokenizers in published formats: tokenizer.json of four families, tiktoken's ranks, and SentencePiece with
a dummy prefix."""

from __future__ import annotations

import base64
import functools
import io
import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import sentencepiece

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

WORDS = "a small red blue star circle in the top bottom left right of it's what colour is caf\u00e9 \u661f No. 64*90"
CORPUS = [" ".join(random.Random(i).sample(WORDS.split(" "), 9)) for i in range(60)]
TEXTS = [
    *CORPUS[:3],
    "",
    " ",
    "  two  spaces ",
    "line\n\n\tindented\r\n",
    "\U0001f9ee\ufeff\0",
    "\u2581a\u2581b ",
    "it'S\u017f",
]
IMAGES = tuple("IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z" for code in range(24))
# Names that a published table has before its pieces of text, and one more that its file does not mark as special.
SPECIAL = ("<s>", "<pad>", "</s>", *IMAGES, "<eoss>", "<racm3:break>", "<reserved08706>")
PLAIN = "<tool_call>"


def strings(count: int, seed: int = 0) -> list[str]:
    """Random texts from all of Unicode, from its common parts, and of strings that are difficult for tokenizers."""
    rng = random.Random(seed)
    parts = (
        lambda: chr(rng.randrange(32, 127)),
        lambda: rng.choice([" ", "  ", "\t", "\n", "\r\n", "'", "\u2028", "\x85", "\0"]),
        lambda: chr(rng.randrange(0xA0, 0x3000)),
        lambda: chr(rng.choice([rng.randrange(0x3000, 0xD800), rng.randrange(0xE000, 0x110000)])),
        lambda: rng.choice(["'S", "'\u017f", "'ll", "e\u0301", "\ufb01", "\u2581", *SPECIAL, *WORDS.split(" ")]),
    )
    return [
        "".join(rng.choice(parts[: rng.choice((2, 4, 5))])() for _ in range(rng.randrange(25))) for _ in range(count)
    ]


@functools.cache
def byte_level(normalizer: str = "", size: int = 420) -> bytes:
    """A byte-level tokenizer.json like Chameleon's, with special tokens first; with normalizer "NFC" like Qwen's."""
    made = Tokenizer(models.BPE())
    if normalizer:
        made.normalizer = getattr(normalizers, normalizer)()
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens([PLAIN])
    return made.to_str().encode()


@functools.cache
def sentence_pieces(prefix: bool) -> bytes:
    """A tokenizer.json made from a SentencePiece model: like Llama's with a prefix, like Gemma's without."""
    corpus = [text.replace(" ", "\u2581") for text in CORPUS]
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    learned.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    spec = json.loads(learned.to_str())
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    known = [name for name in spec["model"]["vocab"] if name not in names]
    spec["model"] |= {"vocab": {name: id for id, name in enumerate([*names, *known])}}
    spec["model"] |= {"byte_fallback": True, "unk_token": "<unk>"}
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"] = [{"id": id, "content": names[id], "special": True} | off for id in range(3)]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    steps = [{"type": "Prepend", "prepend": "\u2581"}, space] if prefix else [space]
    spec["normalizer"] = {"type": "Sequence", "normalizers": steps}
    spec["pre_tokenizer"] = None
    back: list[Any] = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}]
    back += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    back += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    spec["decoder"] = {"type": "Sequence", "decoders": back}
    return json.dumps(spec).encode()


@functools.cache
def ranks(size: int = 600) -> dict[bytes, int]:
    """Ranks of bytes in GPT-2's order, of learned pieces, and of pieces that merges in the order of ranks never
    make."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = seen + [byte for byte in range(256) if byte not in seen]
    found = {bytes((byte,)): rank for rank, byte in enumerate(order)}
    words = [
        [bytes((byte,)) for byte in word.encode()] for text in CORPUS for word in text.replace(" ", "| ").split("|")
    ]
    while len(found) < size - 60:
        (a, b), _ = Counter(pair for word in words for pair in zip(word, word[1:], strict=False)).most_common(1)[0]
        found.setdefault(a + b, len(found))
        words = [_joined(word, a, b) for word in words]
        if not any(len(word) > 1 for word in words):
            break
    rng = random.Random(0)
    while len(found) < size:  # pieces with several ways to make them
        made = b"".join(rng.sample(list(found), 2))
        if len(made) < 8:
            found.setdefault(made, len(found))
    return found


def tiktoken_file(of: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for piece, rank in of.items())


@functools.cache
def dummy_prefix(symbols: Sequence[str] = ()) -> bytes:
    """A SentencePiece model like Llama's: <unk>, <s>, </s>, bytes, and a space before every text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        user_defined_symbols=list(symbols),
        minloglevel=2,
    )
    return model.getvalue()


def _joined(word: list[bytes], a: bytes, b: bytes) -> list[bytes]:
    out: list[bytes] = []
    for piece in word:
        if out and (out[-1], piece) == (a, b):
            out[-1] = a + b
        else:
            out.append(piece)
    return out
