"""Published id tables, scaled down: the real names of special tokens in the real order, with fewer codes and text
pieces.

Each table gives the name of every id and writes the tokenizer's files. Sources: `reference/published_weights.md` §2.2
and §3; the order comes from Chameleon's text_tokenizer.json, Emu3's tokenizer and emu3_vision_tokens.txt, and the
tokenizer.json of Qwen and Gemma.
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Pairs that byte pair encoding joins, in order. They are few, so that most texts still have single bytes.
MERGES = ["t h", "th e", "e r", "i n", "a n", "o n", "r e", "Ġ t", "Ġ a", "Ġ the", "in g", "Ġ c", "Ġc i", "an d", "l l"]
SENTENCES = ["the red circle and the blue square", "a small thing on the ceiling", "there and then, in colour"]


def byte_letters() -> dict[int, str]:
    """The letter of each byte in byte-level BPE, in the order of published tables: "!" is 0, "*" is 9, "0" is 15."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(rest)}


def text_pieces() -> list[str]:
    """256 bytes, then the results of merges."""
    return [*byte_letters().values(), *(pair.replace(" ", "") for pair in MERGES)]


@dataclass(frozen=True)
class Table:
    """Names of the ids 0..V-1; text never becomes one of `special`. `size` may be larger, if there are ids without a
    name."""

    names: tuple[str, ...]
    special: frozenset[str]
    size: int

    def id(self, name: str) -> int:
        return self.names.index(name)

    def ids(self, prefix: str) -> list[int]:
        """The special names that begin with `begin`, ascending."""
        return [i for i, name in enumerate(self.names) if name in self.special and name.startswith(prefix)]

    @property
    def text(self) -> list[int]:
        return [i for i, name in enumerate(self.names) if name not in self.special]

    @property
    def vocabulary(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def byte_level(self) -> dict[str, Any]:
        """tokenizer.json of byte-level BPE."""
        return self._file(
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            MERGES,
        )

    def split(self, normalizer: dict[str, Any] | None = None) -> dict[str, Any]:
        """tokenizer.json like Qwen's and Llama 3's, which first cut text into words and single digits."""
        words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
        stages = [
            {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        ]
        decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        return self._file({"type": "Sequence", "pretokenizers": stages}, decoder, MERGES, normalizer)

    def byte_fallback(self) -> dict[str, Any]:
        """tokenizer.json like Gemma's: spaces are letters, and characters without a piece become bytes."""
        decoder = [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        file = self._file(
            {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
            {"type": "Sequence", "decoders": decoder},
            [pair.replace("Ġ", "▁") for pair in MERGES],
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        )
        file["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
        return file

    def _file(self, before: Any, decoder: Any, merges: list[str], normalizer: Any = None) -> dict[str, Any]:
        special = [name for name in self.names if name in self.special]
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        return {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": self.id(name), "content": name} | flags for name in special],
            "normalizer": normalizer, "pre_tokenizer": before, "post_processor": None, "decoder": decoder,
            "model": {
                "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                "vocab": self.vocabulary, "merges": merges,
            },
        }  # fmt: skip

    def ranks(self) -> str:
        """emu3.tiktoken: each text piece in base64, and its rank."""
        letters = {letter: byte for byte, letter in byte_letters().items()}
        pieces = (bytes(letters[letter] for letter in self.names[i]) for i in self.text)
        return "".join(f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(pieces))


def _table(names: list[str], text: list[str], size: int = 0) -> Table:
    """size: the model's V, if it has ids without names."""
    return Table(tuple(names), frozenset(names) - frozenset(text), size or len(names))


def code_name(code: int) -> str:
    """The name of an image code in Chameleon's table: its decimal digits as letters, A for 0."""
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def chameleon(codes: int = 64, placeholder: str = "<image>") -> Table:
    """The table of Chameleon, Anole and Lumina-mGPT 1; in Meta's file the placeholder is <reserved08707>.

    Reserved names are a few of the real ones, including sizes up to 8 (256 pixels).
    """
    numbers = [*range(8194, 8203), 8705, 8706]  # so that V is a multiple of Meta's four shards
    reserved = [f"<reserved{n:05}>" for n in numbers] + [placeholder, "<reserved08798>", "<reserved08799>"]
    reserved += [f"<reserved{n:05}>" for n in range(8800, 8809)]
    special = ["<s>", "<pad>", "</s>", "<unk>", *map(code_name, range(codes)), "<eoss>", "<racm3:break>", *reserved]
    return _table([*special, *text_pieces()], text_pieces())


def emu3(codes: int = 64, placeholder: str = "<|extra_0|>") -> Table:
    """The table of Emu3 and Emu3.5; in transformers' port <|extra_0|> is called <image>."""
    head = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", placeholder, *(f"<|extra_{i}|>" for i in range(1, 205))]
    marks = ["<|image token|>", "<|image start|>", "<|image end|>"]
    visual = [f"<|visual token {code:06}|>" for code in range(codes)]
    return _table([*text_pieces(), *head, *marks, *visual], text_pieces())


def qwen(gap: int = 5) -> Table:
    """The table of Qwen2 and Qwen3: three special names after the text, and ids without a name up to V."""
    names = [*text_pieces(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return _table(names, text_pieces(), len(names) + gap)


_QWEN_2_5 = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_pad|>", "<|file_sep|>"]


def simplear(codes: int = 64) -> Table:
    """The table of SimpleAR: Qwen2.5's, seven names of its own, and codes without names."""
    own = [f"<|{name}|>" for name in ("t2i", "i2t", "soi", "vtokens", "t2v", "v2t", "sov")]
    names = [*text_pieces(), *_QWEN_2_5, *own]
    return _table(names, text_pieces(), len(names) + codes)


def tar(codes: int = 96) -> Table:
    """The table of Tar: Qwen2.5's, then marks, scales and codes, all with names."""
    own = ["<im_start>", "<im_end>", *(f"<S{n}>" for n in range(3)), *(f"<I{code}>" for code in range(codes))]
    return _table([*text_pieces(), *_QWEN_2_5, *own], text_pieces())


def lumina_2(codes: int = 64) -> Table:
    """The table of Lumina-mGPT 2.0: Qwen's text, then Chameleon's names of controls and sizes, a gap, and at the end
    the codes."""
    reserved = ["<reserved08706>", "<reserved08707>", "<reserved08798>", "<reserved08799>"]
    sizes = [f"<reserved{n:05}>" for n in range(8800, 8809)]
    head = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<racm3:break>", "<eoss>"]
    gap = [f"<unused{i}>" for i in range(7)]
    names = [*text_pieces(), *head, *reserved, *sizes, *gap, *map(code_name, range(codes))]
    return _table(names, text_pieces())


def llama() -> Table:
    """The table of Llama 3: special names after the text."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4))]
    return _table([*text_pieces(), *special], text_pieces())


def gemma(codes: int = 0) -> Table:
    """The table of Gemma. With codes after it, it is Liquid's, in which boi, eoi and <unconditional> are <unused0>, 1
    and 2."""
    head = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]", *(f"<unused{i}>" for i in range(6))]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = [*map(chr, range(ord("!"), ord("~") + 1)), "▁"]
    text = [*bytes_, *(pair.replace(" ", "").replace("Ġ", "▁") for pair in MERGES), *letters]
    names = [*head, *text]
    return _table(names, text, len(names) + codes)


def sentencepiece_model(vocab: int = 320) -> bytes:
    """tokenizer.model like Llama's: <unk> <s> </s>, bytes, pieces; it puts a space before every text."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4), model_writer=out, vocab_size=vocab, model_type="bpe", byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, normalization_rule_name="identity", add_dummy_prefix=True,
        remove_extra_whitespaces=False, split_digits=True, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return out.getvalue()


def write_json(folder: Path, **files: Any) -> None:
    """files: contents by name, without .json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
