"""Text tokenizers from published files: tokenizer.json of the `tokenizers` package, and tiktoken's ranks.

A text never becomes a special token: "<s>" is three characters and does not begin a document. Even if the file asks for
it, nothing is added before or after a text, nothing is cut or padded, and no merge is dropped at random.

In tiktoken, a word that is a piece stays whole. Any other word begins as single bytes. Then the two neighbours that
make the piece with the lowest rank are joined, until no neighbours make a piece. A BPE of `tokenizers` does the same if
its merges are all pairs that make a piece, in the order of the ranks of these pieces. The pattern that cuts a text into
words is not in the file. We use Qwen's pattern, as Emu3 does (baaivision/Emu3, tokenization_emu3.py). Qwen's
normalisation (NFC) loses text and is left out.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ar_tokenizers.codec import JSON, TIKTOKEN, Lossy, refuse_surrogates
from ar_tokenizers.lossless import (
    CHARACTERS,
    CONTROLS,
    JOINED,
    LINES,
    RARE,
    SPACE,
    SPACE_SIGNS,
    SPACES,
    Loss,
    refusal,
    shown,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

_LARGEST = 1 << 24  # most ids in a file: more than any real file has, but few enough for memory
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class PublishedTokenizer:
    """Text to ids in [0, size) and back, as `codec.Codec` says. Made by `from_json` or `from_tiktoken`.

    Args:
      spec: the content of a tokenizer.json.
      tokenizer: the tokenizer made of it.
      file, data: the name and the content of the published file.
      lossy: what to do with a tokenizer that loses text: "refuse" it, or "warn": accept it, and list the losses in
          `losses`.
    """

    def __init__(self, tokenizer: Tokenizer, spec: Mapping[str, Any], file: str, data: bytes, lossy: Lossy) -> None:
        if lossy not in ("refuse", "warn"):
            raise ValueError(f"lossy: expected refuse or warn, got {lossy!r}")
        self._tokenizer, self.file, self.data = tokenizer, file, data
        self.hash = hashlib.sha256(data).hexdigest()
        self._names = {id: name for name, id in tokenizer.get_vocab().items()}
        added = tokenizer.get_added_tokens_decoder()
        self._special = {id for id, token in added.items() if token.special}
        unknown = tokenizer.token_to_id(str(spec["model"].get("unk_token")))  # the id for characters without a piece
        self._unspelled = self._special - {unknown}
        self.symbols = [token.content for id, token in sorted(added.items()) if id not in self._special]
        self.size = max(self._names) + 1
        self._byte_level = "ByteLevel" in _kinds(spec, "decoder")
        spelled = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._space_as_bytes = [] if self._byte_level or None in spelled else [id for id in spelled if id is not None]
        self.losses: tuple[Loss, ...] = shown(list(_rules(spec)), self.encode, self.decode)
        if self.losses and lossy == "refuse":
            raise ValueError(refusal(self.losses))

    @classmethod
    def from_json(
        cls, data: bytes, *, lossy: Lossy = "refuse", text_ids: Collection[int] | None = None
    ) -> PublishedTokenizer:
        """Makes the tokenizer of a tokenizer.json.

        Args:
          text_ids: the ids that text may be encoded with; text never becomes an added token with another id. None: all
            ids except those that the file calls special.

        Raises:
          ValueError: the data is not a tokenizer.json, is neither BPE nor Unigram, has wrong ids, or loses text.
        """
        spec = _checked(data)
        for token in spec["added_tokens"]:
            token["special"] = bool(token.get("special")) if text_ids is None else token["id"] not in text_ids
        spec |= {"truncation": None, "padding": None}
        spec["model"] |= {"dropout": None} if "dropout" in spec["model"] else {}
        tokenizer = _made(lambda: Tokenizer.from_str(json.dumps(spec)))
        for token in spec["added_tokens"]:
            if (found := tokenizer.token_to_id(token["content"])) != token["id"]:
                raise ValueError(
                    f"added_tokens: {token['content']!r}: expected id {token['id']}, as the file says, but the "
                    f"`tokenizers` package gives this token id {found}"
                )
        tokenizer.encode_special_tokens = True
        return cls(tokenizer, spec, JSON, data, lossy)

    @classmethod
    def from_tiktoken(
        cls, data: bytes, *, lossy: Lossy = "refuse", text_ids: Collection[int] | None = None
    ) -> PublishedTokenizer:
        """Makes the tokenizer of a tiktoken file (each line has a piece in base64 and its rank). Texts are cut into
        words as in Qwen.

        text_ids is ignored, because such a file has no special tokens. Raises ValueError if the data is not a tiktoken
        file.
        """
        ranks = _ranks(data)
        signs = _signs()
        names = {piece: "".join(signs[byte] for byte in piece) for piece in ranks}
        merges = []
        for piece, rank in ranks.items():
            halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
            merges += [(rank, ranks[a], ranks[b], names[a], names[b]) for a, b in halves if a in ranks and b in ranks]
        vocab = {names[piece]: rank for piece, rank in ranks.items()}
        tokenizer = Tokenizer(models.BPE(vocab, [(a, b) for *_, a, b in sorted(merges)], ignore_merges=True))
        words = pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])  # type: ignore[assignment]
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        return cls(tokenizer, json.loads(tokenizer.to_str()), TIKTOKEN, data, lossy)

    # ---- encoding and decoding ----------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens. Raises ValueError for a text with a surrogate."""
        refuse_surrogates(text)
        if SPACE not in text or not self._space_as_bytes:
            return self._encode(text)
        first, *rest = map(self._encode, text.split(SPACE))
        return first + [id for part in rest for id in (*self._space_as_bytes, *part)]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not self._unspelled.isdisjoint(ids):  # this happens if a merge in the file makes a special token
            name = next(self._names[id] for id in ids if id in self._unspelled)
            raise ValueError(f"{text!r:.80}: a merge in {self.file} makes the special token {name!r} from this text")
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of valid ids. Special tokens become their names, and bytes that are not UTF-8 become U+FFFD.

        Raises:
          ValueError: an id is invalid.
        """
        pieces = np.asarray(ids, np.int64).tolist()
        if bad := [id for id in pieces if id not in self._names]:
            raise ValueError(f"text ids must be those of {self.file}, in [0, {self.size}); found {bad[:8]}")
        return self._tokenizer.decode(pieces, skip_special_tokens=False)

    # ---- what a piece is ----------------------------------------------------------------------------------------

    @functools.cached_property
    def piece_bytes(self) -> np.ndarray:
        """int32 [size]: the number of UTF-8 bytes that each id stands for; 0 for special tokens and unused ids."""
        out = np.zeros(self.size, np.int32)
        for id, name in self._names.items():
            if id not in self._special:
                out[id] = len(self._bytes(name))
        return out

    def is_byte(self, id: int) -> bool:
        """Whether an id stands for one byte of a character that has no piece."""
        name = self._names.get(id, "")
        if not self._byte_level:
            return bool(_BYTE.fullmatch(name))
        return len(name) == 1 and self._bytes(name)[0] > 127

    def _bytes(self, name: str) -> bytes:
        if self._byte_level:
            known = _bytes_of_signs()
            return bytes(known[sign] for sign in name) if all(sign in known for sign in name) else name.encode()
        return b"?" if _BYTE.fullmatch(name) else name.replace(SPACE, " ").encode()


# ---- how a file loses text ----------------------------------------------------------------------------------------

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_HARMLESS = ("Sequence", "Prepend", "Replace")  # these normalizers lose nothing, or have their own rules
_PREFIX = "adds a space to every text, so separately encoded texts get spaces between them"


def _rules(spec: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[Sequence[str]]]]:
    """Every setting that loses text, and probes that may show its effect."""
    for step in _steps(spec.get("normalizer")):
        kind = step.get("type")
        if kind == "Prepend":
            yield f"normalizer Prepend {_PREFIX}", (JOINED,)
        elif kind == "Replace" and step.get("pattern") != {"String": " "}:
            yield f"normalizer Replace rewrites {step.get('pattern')}", (SPACES, CHARACTERS)
        elif kind not in _HARMLESS:
            yield f"normalizer {kind} rewrites characters", (CHARACTERS, LINES, CONTROLS, SPACES)
    for step in _steps(spec.get("pre_tokenizer")):
        by_default = step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        if step.get("add_prefix_space", by_default):
            yield f"pre_tokenizer {step.get('type')} {_PREFIX}", (JOINED, SPACE_SIGNS)
    if not spec["model"].get("byte_fallback") and "ByteLevel" not in _kinds(spec, "pre_tokenizer"):
        yield "model.byte_fallback is off: a character without a piece is lost", (RARE, CONTROLS)
    for token in spec["added_tokens"]:
        if not token.get("special") and (token.get("lstrip") or token.get("rstrip")):
            name = token["content"]
            yield f"added token {name!r} removes the spaces next to it", ((f"a {name} b",),)


def _steps(part: object) -> Iterator[Mapping[str, object]]:
    """Yields the steps of a part of the file. If the part is a sequence, the sequence itself comes first, then each of
    its steps."""
    if isinstance(part, Mapping):
        yield part
        for name in ("normalizers", "pretokenizers", "decoders"):
            for inner in part.get(name) or ():
                yield from _steps(inner)


def _kinds(spec: Mapping[str, object], part: str) -> set[Any]:
    return {step.get("type") for step in _steps(spec.get(part))}


# ---- files that somebody sent -------------------------------------------------------------------------------------


def _checked(data: bytes) -> dict[str, Any]:
    """The content of a tokenizer.json. Raises ValueError if a part has the wrong type or two tokens have one id."""
    try:
        spec = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a tokenizer.json, found a file that is not JSON: {error}") from error
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise ValueError("expected a tokenizer.json, found no model in this file")
    kind, vocab = spec["model"].get("type", "BPE"), spec["model"].get("vocab")
    if kind not in ("BPE", "Unigram"):
        raise ValueError(f"model.type: expected BPE or Unigram, found {kind!r:.40}")
    if kind == "Unigram":
        if not isinstance(vocab, list):
            raise ValueError(f"model.vocab: expected a list of pieces, found {vocab!r:.40}")
        vocab = {id: id for id in range(len(vocab))}
    if not isinstance(vocab, dict) or not vocab:
        raise ValueError(f"model.vocab: expected pieces and their ids, found {vocab!r:.40}")
    spec["added_tokens"] = added = spec.get("added_tokens") or []
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and token["content"] for token in added
    ):
        raise ValueError(f"added_tokens: expected tokens with their content, found {added!r:.80}")
    ids = [*vocab.items(), *((token["content"], token.get("id")) for token in added if token["content"] not in vocab)]
    seen: dict[int, Any] = {}
    for name, id in ids:
        if type(id) is not int or not 0 <= id < _LARGEST:
            raise ValueError(f"{name!r:.40}: expected a whole number below {_LARGEST} as the id, found {id!r:.40}")
        if seen.setdefault(id, name) is not name:
            raise ValueError(f"{name!r:.40} and {seen[id]!r:.40} have the same id, {id}")
    return spec


def _made(make: Any) -> Any:
    try:
        return make()
    except BaseException as error:  # a panic in Rust is a BaseException
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(
                f"expected a tokenizer.json, found a file that the `tokenizers` package cannot read: {error}"
            ) from error
        raise


def _ranks(data: bytes) -> dict[bytes, int]:
    """The rank of each piece. Raises ValueError unless the ranks are 0..n-1 and every byte is a piece."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"line {number}: expected a piece in base64 and its rank, found {line!r:.60}") from error
    if missing := [byte for byte in range(256) if bytes((byte,)) not in ranks]:
        raise ValueError(f"expected a rank for every byte, found none for byte {missing[0]}")
    if sorted(ranks.values()) != list(range(len(ranks))) or b"" in ranks:
        raise ValueError(
            f"expected each rank from 0 to {len(ranks) - 1} once, for {len(ranks)} pieces; found other ranks or an "
            "empty piece"
        )
    return ranks


@functools.cache
def _signs() -> tuple[str, ...]:
    """The character that stands for each byte in a byte-level vocabulary: the character with the same number if it is
    printable, else the next unused character from U+0100 on. From GPT-2 (openai/gpt-2, encoder.py).
    """
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in seen else next(others)) for byte in range(256))


@functools.cache
def _bytes_of_signs() -> dict[str, int]:
    return {sign: byte for byte, sign in enumerate(_signs())}
