"""Converts a SentencePiece model to a tokenizer.json, which the `tokenizers` package and transformers read.

Both tokenizers encode every text with the same ids, with two exceptions. The `tokenizers` package reads a U+2581 in a
text as a space (here it is encoded as bytes). It also turns text that spells the name of a token in `added` into that
token, unless it is told to split special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import sentencepiece

from ar_tokenizers.lossless import SPACE, is_bpe
from ar_tokenizers.text import TextTokenizer


def to_tokenizer_json(tokenizer: TextTokenizer, added: Sequence[str] = ()) -> str:
    """The file's content.

    Args:
      tokenizer: a lossless tokenizer, such as `TextTokenizer.train` makes.
      added: names of the special tokens. Their ids follow the ids of text, so they begin at `size`.

    Raises:
      ValueError: the tokenizer loses text (then export its published file instead), or a name is also a piece.
    """
    if tokenizer.losses:
        raise ValueError(f"expected a text tokenizer that loses no text, but this one does: {tokenizer.losses[0]}")
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    pieces = [processor.id_to_piece(id) for id in range(tokenizer.size)]
    if both := sorted(set(pieces) & set(added)):
        raise ValueError(f"expected token names that are not also text pieces, found {both[0]!r}")
    scores = [processor.get_score(id) for id in range(tokenizer.size)]
    plain = [id for id in range(tokenizer.size) if not (processor.is_byte(id) or processor.is_unknown(id))]
    unknown = next((pieces[id] for id in range(tokenizer.size) if processor.is_unknown(id)), None)
    model: dict[str, object]
    if is_bpe(tokenizer.model_bytes):
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: id for id, piece in enumerate(pieces)},
            "merges": _merges(pieces, scores, plain),
        }
    else:
        unknown_id = next(id for id in range(tokenizer.size) if processor.is_unknown(id))
        entries = [[piece, score] for piece, score in zip(pieces, scores, strict=True)]
        model = {"type": "Unigram", "unk_id": unknown_id, "vocab": entries, "byte_fallback": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": tokenizer.size + i, "content": name, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for i, name in enumerate(added)
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": model,
    }
    return json.dumps(content, ensure_ascii=False) + "\n"


def _merges(pieces: Sequence[str], scores: Sequence[float], plain: Sequence[int]) -> list[list[str]]:
    """Every pair of pieces that makes a piece. The order is that in which SentencePiece would join them: pairs that
    make the piece with the best score come first.
    """
    known = {pieces[id]: id for id in plain}
    pairs = []
    for id in plain:
        piece = pieces[id]
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        found = sorted((known[left], known[right]) for left, right in halves if left in known and right in known)
        pairs += [(-scores[id], id, left, right) for left, right in found]
    return [[pieces[left], pieces[right]] for _, _, left, right in sorted(pairs)]
