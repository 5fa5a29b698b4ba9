"""tokenizer.json and tiktoken's ranks: decoding restores texts, no text becomes a special token, broken files are
refused."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ar_tokenizers import codec as codecs
from ar_tokenizers.codec import Codec
from ar_tokenizers.published import PublishedTokenizer
from ar_tokenizers.reading import codec, load_codec
from ar_tokenizers.text import TextTokenizer

from tests import tokenizer_files as files
from tests.tokenizer_files import PLAIN, SPECIAL, TEXTS, strings
from tokenizers import Tokenizer

LOSSLESS: dict[str, Callable[[], Codec]] = {
    "chameleon": lambda: codec("tokenizer.json", files.byte_level()),
    "gemma": lambda: codec("tokenizer.json", files.sentence_pieces(prefix=False)),
    "tiktoken": lambda: codec("text.tiktoken", files.tiktoken_file(files.ranks())),
}


@pytest.mark.parametrize("family", LOSSLESS)
def test_every_text_comes_back(family):
    tokenizer = LOSSLESS[family]()
    assert tokenizer.losses == ()
    for text in [*TEXTS, *strings(1000)]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= id < tokenizer.size for id in ids)
        assert tokenizer.piece_bytes[ids].sum() == len(text.encode()), text
    joined = [id for part in ("a red", "dish star", "\u661f") for id in tokenizer.encode(part)]
    assert tokenizer.decode(joined) == "a reddish star\u661f"
    assert sum(len(tokenizer.encode(text)) for text in files.CORPUS) < 0.6 * sum(map(len, files.CORPUS))


@pytest.mark.parametrize("family", LOSSLESS)
def test_ids_are_those_of_the_published_tokenizer(family):
    tokenizer = LOSSLESS[family]()
    if family == "tiktoken":
        for text in [*TEXTS, *strings(1000, seed=1)]:
            if all(unicodedata.category(sign) != "Cn" for sign in text):
                assert tokenizer.encode(text) == ranked(text, files.ranks()), text
        whole = files.ranks() | {b"qxzj": 600}  # which no pair of pieces makes
        lines = files.tiktoken_file(whole).splitlines(keepends=True)
        other = codec("x.tiktoken", b"".join(reversed(lines)))
        assert other.encode("qxzj") == [600] == ranked("qxzj", whole)
        for text in [text.replace(" ", "") for text in files.CORPUS]:
            assert other.encode(text) == tokenizer.encode(text), text
        return
    theirs = Tokenizer.from_str(tokenizer.data.decode())
    for text in strings(300, seed=1):
        if not any(name in text for name in (*SPECIAL, PLAIN, "\u2581")):
            assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def ranked(text: str, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's algorithm, written again: word by word, the two neighbours with the lowest rank are joined."""
    out = []
    while text:
        end = word_end(text)
        parts = [bytes((byte,)) for byte in text[:end].encode()]
        if (whole := b"".join(parts)) in ranks:
            parts = [whole]
        while len(parts) > 1:
            pairs = [(ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1)]
            rank, i = min(pairs)
            if rank == len(ranks):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        out += [ranks[part] for part in parts]
        text = text[end:]
    return out


SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


def word_end(text: str) -> int:
    """The end of the first word, for each of the pattern's seven alternatives."""

    def run(at: int, inside: Callable[[str], bool]) -> int:
        while at < len(text) and inside(text[at]):
            at += 1
        return at

    def letter(sign: str) -> bool:
        return unicodedata.category(sign)[0] == "L"

    def other(sign: str) -> bool:
        return unicodedata.category(sign)[0] not in "LN" and sign not in SPACES

    if text[0] == "'":
        for ending in ("s", "t", "re", "ve", "m", "ll", "d"):
            if text[1 : 1 + len(ending)].casefold() == ending:
                return 1 + len(ending)
    skip = text[0] not in "\r\n" and unicodedata.category(text[0])[0] not in "LN"
    if (end := run(skip, letter)) > skip:
        return end
    if unicodedata.category(text[0])[0] == "N":
        return 1
    if (end := run(begin := text[0] == " ", other)) > begin:
        return run(end, lambda sign: sign in "\r\n")
    spaces = run(0, lambda sign: sign in SPACES)
    if line := max(text[:spaces].rfind("\r"), text[:spaces].rfind("\n")) + 1:
        return line
    return spaces - 1 if spaces < len(text) and spaces > 1 else spaces


@pytest.mark.interop
def test_ids_are_tiktoken_s():
    tiktoken = pytest.importorskip("tiktoken")
    from ar_tokenizers.published import _QWEN_WORDS

    theirs = tiktoken.Encoding("x", pat_str=_QWEN_WORDS, mergeable_ranks=files.ranks(), special_tokens={"<s>": 600})
    ours = LOSSLESS["tiktoken"]()
    for text in [*TEXTS, *strings(5_000, seed=2)]:
        assert ours.encode(text) == theirs.encode_ordinary(text), text
    points = [*range(0x3000), *range(0x3000, 0xD800, 61), *range(0xE000, 0x110000, 997)]
    for text in (context.format(chr(point)) for context in ("a{}b", "'{}x", "  {}1") for point in points):
        assert ours.encode(text) == theirs.encode_ordinary(text), ascii(text)


# ---- special tokens -------------------------------------------------------------------------------------------------


def test_text_that_spells_a_special_token_never_becomes_one():
    tokenizer = LOSSLESS["chameleon"]()
    text = " ".join(SPECIAL) + "<s>".join(SPECIAL)
    ids = tokenizer.encode(text)
    assert min(ids) >= len(SPECIAL) and tokenizer.decode(ids) == text
    assert Tokenizer.from_str(tokenizer.data.decode()).encode(text, add_special_tokens=False).ids[0] == 0, "it would"
    assert tokenizer.decode([0, 3, ids[0]]) == "<s>IMGIMGAZ" + text[0], "their names are kept"
    plain = tokenizer.encode(PLAIN)
    assert len(plain) == 1 and tokenizer.symbols == [PLAIN] and not tokenizer.piece_bytes[: len(SPECIAL)].any()
    assert tokenizer.piece_bytes[plain[0]] == len(PLAIN)
    closed = codec("tokenizer.json", files.byte_level(), text_ids=range(len(SPECIAL), plain[0]))
    assert plain[0] not in closed.encode(PLAIN) and closed.decode(closed.encode(PLAIN)) == PLAIN
    assert closed.symbols == [] and closed.hash == tokenizer.hash


def test_a_symbol_of_sentencepiece_is_spelled_where_it_is_no_text():
    model = files.dummy_prefix(("<unused0>",))
    open_, spelled = TextTokenizer(model, lossy="warn"), TextTokenizer(model, lossy="warn", text_ids=range(4, 400))
    assert 3 in open_.encode("a <unused0>") and open_.symbols == ["<unused0>"]
    ids = spelled.encode("a <unused0>")
    assert 3 not in ids and spelled.decode(ids) == "a <unused0>" and spelled.symbols == []
    assert spelled.data == model and spelled.hash == open_.hash
    assert TextTokenizer(model, lossy="warn", text_ids=range(400)).encode("a <unused0>") == open_.encode("a <unused0>")


def test_what_a_file_says_of_chance_length_and_beginnings_is_not_done():
    spec = json.loads(files.byte_level())
    spec["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    spec["padding"] = dict(strategy={"Fixed": 8}, direction="Right", pad_to_multiple_of=None)
    spec["padding"] |= dict(pad_id=1, pad_type_id=0, pad_token="<pad>")
    spec["model"]["dropout"] = 0.5
    begin = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    spec["post_processor"] = dict(
        type="TemplateProcessing",
        single=begin,
        pair=begin,
        special_tokens={"<s>": dict(id="<s>", ids=[0], tokens=["<s>"])},
    )
    changed, plain = codec("tokenizer.json", json.dumps(spec).encode()), LOSSLESS["chameleon"]()
    for text in files.CORPUS[:9]:
        assert changed.encode(text) == plain.encode(text)
    assert changed.encode("") == []


def test_a_special_token_that_a_merge_makes_is_refused_text_by_text():
    spec = json.loads(files.byte_level())
    spec["model"]["vocab"]["ab"] = 500
    spec["model"]["merges"].insert(0, ["a", "b"])
    spec["added_tokens"].pop()
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"].append({"id": 500, "content": "ab", "special": True} | off)
    tokenizer = codec("tokenizer.json", json.dumps(spec).encode())
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"
    with pytest.raises(ValueError, match="makes the special token 'ab' from this text"):
        tokenizer.encode("tab")


# ---- what loses text ------------------------------------------------------------------------------------------------


def changed(change: Callable[[dict[str, Any]], Any], data: bytes | None = None) -> bytes:
    spec = json.loads(data or files.byte_level())
    change(spec)
    return json.dumps(spec).encode()


LOSSY = {
    "qwen": (lambda: files.byte_level("NFC"), "normalizer NFC rewrites characters: .* comes back as", "e\u0301"),
    "llama": (lambda: files.sentence_pieces(prefix=True), "Prepend adds a space to every text.*'a reddish star'", ""),
    "lowercase": (lambda: files.byte_level("Lowercase"), "normalizer Lowercase rewrites characters", "A"),
    "prefix": (
        lambda: changed(lambda spec: spec["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True)),
        "pre_tokenizer ByteLevel adds a space",
        "a",
    ),
    "no bytes": (
        lambda: changed(lambda spec: spec["model"].update(byte_fallback=False), files.sentence_pieces(prefix=False)),
        "model.byte_fallback is off: a character without a piece is lost: .* comes back",
        "\U0001f9ee",
    ),
    "spaces beside": (
        lambda: changed(lambda spec: spec["added_tokens"][-1].update(lstrip=True)),
        "added token '<tool_call>' removes the spaces next to it: 'a <tool_call> b' comes back as",
        "a <tool_call>",
    ),
    "no way back": (
        lambda: changed(lambda spec: spec.update(decoder=None)),
        "no setting of the model explains why",
        "a b",
    ),
}


@pytest.mark.parametrize("name", LOSSY)
def test_what_loses_text_is_refused_or_told(name):
    data, says, lost = LOSSY[name]
    with pytest.raises(ValueError, match="(?s)this text tokenizer loses text.*" + says):
        codec("tokenizer.json", data())
    tokenizer = codec("tokenizer.json", data(), lossy="warn")
    assert len(tokenizer.losses) == 1
    assert not lost or tokenizer.decode(tokenizer.encode(lost)) != lost


@pytest.mark.parametrize(
    "make", [lambda: codec("tokenizer.json", files.sentence_pieces(prefix=True), lossy="warn"),
             lambda: codec("text.model", files.dummy_prefix(), lossy="warn")],
    ids=["tokenizer.json", "text.model"],
)  # fmt: skip
def test_a_dummy_prefix_is_taken_away_once(make):
    tokenizer = make()
    for text in [*TEXTS, *strings(300)]:
        if "\u2581" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text, text
    pieces = [id for part in ("a red", "star") for id in tokenizer.encode(part)]
    assert tokenizer.decode(pieces) == "a red star", "which is why it is told"
    assert tokenizer.decode(pieces[1:])[0] != " " and tokenizer.encode("") == []


# ---- pieces ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", LOSSLESS)
def test_half_a_character_is_a_replacement_and_single_bytes_are_known(family):
    tokenizer = LOSSLESS[family]()
    ids = tokenizer.encode("\U0001f9ee")
    assert len(ids) == 4 and all(map(tokenizer.is_byte, ids))
    assert set(tokenizer.decode(ids[:2])) == {"\ufffd"} and tokenizer.decode(ids[:2] + tokenizer.encode("a"))[-1] == "a"
    assert not any(map(tokenizer.is_byte, tokenizer.encode("a star")))
    for ids in ([tokenizer.size], [-1]):
        with pytest.raises(ValueError, match="text ids must be"):
            tokenizer.decode(ids)
    assert tokenizer.decode(np.array(tokenizer.encode("star"))) == "star"
    with pytest.raises(ValueError, match="position 1 of .* is the surrogate U\\+D800"):
        tokenizer.encode("a\ud800")


def test_ids_of_nothing_are_no_ids():
    spec = json.loads(files.byte_level())
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"].append({"id": 900, "content": "<far>", "special": True} | off)
    with pytest.raises(ValueError, match="added_tokens: '<far>': expected id 900, .*this token id 363"):
        codec("tokenizer.json", json.dumps(spec).encode())
    spec["model"]["vocab"]["<far>"] = 900
    spec["added_tokens"].pop(-2)
    tokenizer = codec("tokenizer.json", json.dumps(spec).encode())
    assert tokenizer.size == 901 and tokenizer.decode([900]) == "<far>" and tokenizer.piece_bytes[899] == 0
    with pytest.raises(ValueError, match=r"found \[899\]"):
        tokenizer.decode([899])


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_folder_has_one_tokenizer(tmp_path):
    assert codecs.find(tmp_path) is None
    for name, data in (("tokenizer.json", files.byte_level()), ("text.model", files.dummy_prefix())):
        (tmp_path / name).write_bytes(data)
        assert load_codec(tmp_path / name, lossy="warn").file == name
        if name == "tokenizer.json":
            assert codecs.find(tmp_path) == tmp_path / name
    with pytest.raises(ValueError, match="expected one text tokenizer, found text.model and tokenizer.json"):
        codecs.find(tmp_path)
    (tmp_path / "emu3.tiktoken").write_bytes(files.tiktoken_file(files.ranks()))
    assert load_codec(tmp_path / "emu3.tiktoken").file == "text.tiktoken"
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(ValueError, match="tokenizer.json: expected a tokenizer.json, found no model"):
        load_codec(tmp_path / "tokenizer.json")


def model(**changes: Any) -> bytes:
    return changed(lambda spec: spec["model"].update(changes))


BROKEN = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
HOSTILE = {
    "not JSON": (b"\x80\x04.", "expected a tokenizer.json, found a file that is not JSON"),
    "nested": (b"[" * 100_000, "expected a tokenizer.json, found a file that is not JSON"),
    "a list": (b"[]", "found no model"),
    "no model": (b'{"version": "1.0"}', "found no model"),
    "another model": (model(type="WordLevel"), "model.type: expected BPE or Unigram, found 'WordLevel'"),
    "no pieces": (model(vocab=[]), r"model.vocab: expected pieces and their ids, found \[\]"),
    "a text for an id": (model(vocab={"a": "0"}), "'a': expected a whole number below .* as the id, found '0'"),
    "a truth for an id": (model(vocab={"a": True}), "'a': expected a whole number below .*, found True"),
    "below 0": (model(vocab={"a": -1}), "'a': expected a whole number below .*, found -1"),
    "a huge id": (model(vocab={"a": 0, "b": 1 << 40}), "'b': expected a whole number below .*, found 1099511627776"),
    "an id twice": (model(vocab={"a": 0, "b": 0}), "'b' and 'a' have the same id, 0"),
    "a merge of nothing": (model(merges=[["a", "\u2603"]]), "package cannot read: .*vocabulary"),
    "merges of numbers": (model(merges=[[1, 2]]), "found a file that the `tokenizers` package cannot read"),
    "added numbers": (changed(lambda spec: spec.update(added_tokens=[7])), "added_tokens: expected tokens with"),
    "no content": (changed(lambda spec: spec["added_tokens"][0].update(content="")), "added_tokens: expected tokens"),
    "a moved token": (
        changed(lambda spec: spec["added_tokens"][0].update(id=7)),
        "added_tokens: '<s>': expected id 7, .*this token id 0",
    ),
    "a broken pattern": (
        changed(lambda spec: spec["pre_tokenizer"]["pretokenizers"].append(BROKEN)),
        "found a file that the `tokenizers` package cannot read: .*parenthesis",
    ),
    "a panic": (
        changed(lambda spec: spec.update(normalizer=dict(type="Precompiled", precompiled_charsmap="AAAA"))),
        "found a file that the `tokenizers` package cannot read: .*charsmap",
    ),
    "an unknown step": (changed(lambda spec: spec.update(decoder=dict(type="Nope"))), "package cannot read"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_broken_files_are_refused_by_name(name):
    data, says = HOSTILE[name]
    with pytest.raises(ValueError, match=says):
        PublishedTokenizer.from_json(data, lossy="warn")


@pytest.mark.parametrize(
    "data, says",
    [
        (b"a 0", "line 1: expected a piece in base64 and its rank, found b'a 0'"),
        (b"YQ== 0\n\nYg==", "line 3: expected a piece in base64"),
        (b"YQ== x", "line 1: expected a piece"),
        (b"YQ== 0", "expected a rank for every byte, found none for byte 0"),
        (files.tiktoken_file(files.ranks() | {b"ab?": 700}), "expected each rank from 0 to 600 once, for 601 pieces"),
        (files.tiktoken_file(files.ranks() | {b"ab?": 599}), "expected each rank"),
        (b"{}", "line 1: expected a piece"),
    ],
)
def test_broken_ranks_are_refused_by_line(data, says):
    with pytest.raises(ValueError, match=says):
        codec("x.tiktoken", data)
    with pytest.raises(ValueError, match="lossy: expected refuse or warn, got 'yes'"):
        codec("x.tiktoken", files.tiktoken_file(files.ranks()), lossy="yes")  # type: ignore[arg-type]
