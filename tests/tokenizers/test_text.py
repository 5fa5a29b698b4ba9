"""Any text is restored by decoding, and any ids decode to some text."""

from __future__ import annotations

import io
import random
import re
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from ar_tokenizers.lossless import reachable_symbols
from ar_tokenizers.text import TextTokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ar_unified.language.document import Document, TextPart
from ar_unified.language.grammar import Grammar
from ar_unified.language.syntax import fixed_grid
from ar_unified.language.vocabulary import CONTROLS, Role, Vocabulary

TEXTS = Path(__file__).parents[3] / "shared" / "data" / "text"
WORDS = "a red blue green small large circle square triangle star left of above the and is there".split()


def captions(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=7)) + f", {draw.randrange(100)}.\n" for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(captions(300), vocab_size=384)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def either(request) -> TextTokenizer:
    return TextTokenizer.train(captions(300), vocab_size=384, model_type=request.param)


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("  a  \n\n\t\r\n ")
@example("\u2581")
@example(" \u2581\u2581 a\u2581 ")
@example("\u2585\0\ufffd\ufeff \u2047 ")
@example("<boi> <s> </s> <unk> <0x0A> <pad>")
@example("a red \u2581 star\n" * 100)
@settings(max_examples=200, deadline=None)
def test_round_trip(either, text):
    ids = either.encode(text)
    assert either.decode(ids) == text
    assert all(0 < id < either.size for id in ids)  # 0 is <unk>


def thirty_scripts() -> dict[str, str]:
    """Texts of words with the letters and marks of thirty blocks of Unicode, which differ like languages."""
    blocks = [
        *(0x61, 0xE0, 0x100, 0x250, 0x3B1, 0x430, 0x561, 0x5D0, 0x627, 0x710, 0x905, 0x985, 0xA05, 0xA85, 0xB05),
        *(
            0xB85,
            0xC05,
            0xC85,
            0xD05,
            0xE01,
            0xE81,
            0xF40,
            0x1000,
            0x10D0,
            0x1200,
            0x13A0,
            0x1780,
            0x3041,
            0x4E00,
            0xAC00,
        ),
    ]
    texts = {}
    for block in blocks:
        draw = random.Random(block)
        letters = [chr(code) for code in range(block, block + 26) if unicodedata.category(chr(code)) != "Cn"]
        words = ["".join(draw.choices(letters, k=draw.randrange(1, 8))) for _ in range(120)]
        lines = [" ".join(draw.choices(words, k=9)) + draw.choice(".!?\u3002\u0964\u061f") for _ in range(60)]
        texts[f"U+{block:04X}"] = "\n".join(lines) + "\n"
    return texts


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_thirty_languages_and_source_code_come_back(model_type):
    """Uses the declaration of human rights and Shakespeare if they are beside the repository, else similar texts."""
    files = sorted((TEXTS / "udhr").glob("*.txt"))
    languages = {file.stem: file.read_text(encoding="utf-8") for file in files} or thirty_scripts()
    others = sorted(Path(__file__).parents[2].rglob("ar_unified/**/*.py"))
    others += [TEXTS / "tinyshakespeare.txt"] if files else []
    tokenizer = TextTokenizer.train("\n".join(languages.values()).splitlines(), 8000, model_type=model_type)
    assert len(languages) == 30 and len(others) > 50
    for name, text in languages.items() | {(str(file), file.read_text(encoding="utf-8")) for file in others}:
        assert tokenizer.decode(tokenizer.encode(text)) == text, name


SPELLED = [*(f"<{name}>" for name in CONTROLS), "<s>", "</s>", "<unk>", "<0x0A>", "\u2581", "<|endoftext|>", " ", "a"]


@given(st.lists(st.sampled_from(SPELLED), min_size=1).map("".join))
@settings(max_examples=100, deadline=None)
def test_text_never_spells_a_control_token(tokenizer, text):
    vocabulary = Vocabulary(tokenizer.size, codebook_size=4, text_hash=tokenizer.hash)
    grammar = Grammar(vocabulary, fixed_grid(1, 1), tokenizer)
    bos, *inside, eos = grammar.encode(Document.of((TextPart(text),))).tokens
    assert (bos, eos) == (vocabulary.bos, vocabulary.eos)
    assert set(vocabulary.role(np.array(inside)).tolist()) == {Role.TEXT}
    assert grammar.parse(np.array([bos, *inside, eos])).parts == (TextPart(text),)


@given(
    data=st.data(), words=st.lists(st.sampled_from([*WORDS, " ", "\n", "\t", "\u00e9", "\u2581", "\u4eba"]), min_size=1)
)
@settings(max_examples=100, deadline=None)
def test_texts_join_and_part_exactly(either, data, words):
    text = " ".join(words)
    cut = data.draw(st.integers(0, len(text)))
    assert either.decode(either.encode(text[:cut]) + either.encode(text[cut:])) == text
    ids = either.encode(text)
    border = data.draw(st.integers(0, len(ids)))
    while 0 < border < len(ids) and either.is_byte(ids[border]):  # not inside a character
        border += 1
    assert either.decode(ids[:border]) + either.decode(ids[border:]) == text


def test_blocks_of_a_long_text_have_the_ids_of_the_whole(tokenizer):
    text = "".join(captions(40)) + "star" * 300 + " ".join(captions(40)) + "  a\n\n  b" * 100
    whole = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes).encode(text)
    assert tokenizer.encode(text) == whole


def test_a_model_whose_pieces_span_words_is_not_cut_into_blocks():
    texts = ["a red star of the sea\n"] * 50
    model = foreign(texts, split_by_whitespace=False)
    tokenizer = TextTokenizer(model)
    text = "a red star of the sea " * 60
    assert len(tokenizer.encode("a red star")) == 1
    assert tokenizer.encode(text) == sentencepiece.SentencePieceProcessor(model_proto=model).encode(text)


def test_learned_pieces_are_used(tokenizer):
    assert len(tokenizer.encode("a small triangle left of the blue star")) == 8
    assert len(tokenizer.encode("\n\t")) == 2


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_decode_accepts_whatever_is_sampled(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.size - 1), max_size=20))
    text = tokenizer.decode(np.array(ids, np.int32))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_piece_bytes_add_up_to_the_text(tokenizer):
    text = "  a red\n\tstar \u2581 caf\u00e9 \U0001f600"
    assert tokenizer.piece_bytes[tokenizer.encode(text)].sum() == len(text.encode())


def test_decode_replaces_broken_bytes_and_refuses_other_ids(tokenizer):
    smile = tokenizer.encode("\U0001f600")
    assert tokenizer.decode(smile[:3] + tokenizer.encode("a")) == "\ufffd\ufffd\ufffda"
    assert tokenizer.decode([0]) == "\ufffd"
    with pytest.raises(ValueError, match=rf"\[0, {tokenizer.size}\); found \[-1, {tokenizer.size}\]"):
        tokenizer.decode([1, -1, tokenizer.size])


def test_training_is_deterministic():
    assert len({TextTokenizer.train(iter(captions(500)), 384).hash for _ in range(2)}) == 1


def test_training_draws_from_the_whole_of_a_long_stream():
    texts = (word for word in ("early bird", "late owl") for _ in range(1000))
    tokenizer = TextTokenizer.train(texts, 300, max_bytes=1000)
    assert len(tokenizer.encode("early")) == len(tokenizer.encode("late")) == 1


def test_memory_does_not_grow_with_the_corpus():
    """20 MB are read, and at most 100 kB of them are kept. Python cannot trace SentencePiece's own memory."""
    given = 0

    def corpus():
        nonlocal given
        for caption in captions(2000):
            given += 1
            yield caption * 300  # about 10 kB

    tracemalloc.start()
    try:
        TextTokenizer.train(corpus(), 300, max_bytes=100_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert given == 2000 and peak < 2_000_000


def test_small_and_large_vocabularies():
    assert 259 < TextTokenizer.train(["abc abd"], 100_000).size < 300
    for size in (260, -1):
        with pytest.raises(ValueError, match=f"vocab_size {size} is too small: this corpus needs at least 263"):
            TextTokenizer.train(["abc "], size)


def test_long_texts_are_not_dropped():
    long = TextTokenizer.train(["circle square " * 20_000], 290)
    assert len(long.encode("circle")) == 1


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_corpus_without_spaces_teaches_spaces_all_the_same(model_type):
    tokenizer = TextTokenizer.train(["\u4eba\u4eba\u751f\u800c\u81ea\u7531"] * 9, 300, model_type=model_type)
    assert tokenizer.decode(tokenizer.encode(" a  b ")) == " a  b " and len(tokenizer.encode(" ")) == 1


@pytest.mark.parametrize("sign", ["\u2585", "\u2581", "\0", "\u2047", "\x85", "\u2028"])
def test_texts_with_a_reserved_character_are_learned_from_on_both_sides_of_it(sign):
    with_it = [f"sparkline zebra {i}{sign}quantises xylophones" for i in range(40)]
    others = [f"the quick brown fox {i}" for i in range(40)]
    for texts in (with_it, with_it + others):
        found = TextTokenizer.train(texts, 420)
        assert len(found.encode("sparkline zebra")) < 6 and len(found.encode("quantises xylophones")) < 6
        for text in (*texts[:3], sign, f"{sign}{sign} a {sign}"):
            assert found.decode(found.encode(text)) == text
    assert len(TextTokenizer.train(with_it, 420).encode("\u2585")) == 3, "three bytes"
    TextTokenizer.train(with_it, 420, model_type="unigram")


def test_texts_of_reserved_characters_alone_are_told():
    for text in ("\u2585", "\u2581\u2581", "\n", "\t\0"):
        with pytest.raises(ValueError, match=r"nothing to learn from 3 texts: .*U\+2581 and U\+2585"):
            TextTokenizer.train([text] * 3, 300)


def test_training_errors_keep_their_cause():
    def broken():
        yield "a text"
        raise KeyError("row 7")

    with pytest.raises(KeyError, match="row 7"):
        TextTokenizer.train(broken(), 300)
    with pytest.raises(ValueError, match="no text"):
        TextTokenizer.train(["", ""], 300)
    with pytest.raises(ValueError, match=r"position 2 .* surrogate U\+D800"):
        TextTokenizer.train(["ab\ud800"], 300)


def test_surrogates_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"position 1 .* surrogate U\+DC80"):
        tokenizer.encode("a\udc80")


def foreign(texts: list[str], **settings) -> bytes:
    """A SentencePiece model trained elsewhere: lossless but for `settings`."""
    lossless = dict(
        normalization_rule_name="identity",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=330, model_type="bpe",
        hard_vocab_limit=False, minloglevel=2, **(lossless | settings),
    )  # fmt: skip
    return model.getvalue()


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        (
            dict(normalization_rule_name="nmt_nfkc"),
            r"normalizer_spec.name = 'nmt_nfkc' rewrites .* back as 'full",
        ),
        (
            dict(remove_extra_whitespaces=True),
            r"remove_extra_whitespaces .*'  two  spaces ' .* as 'two spaces'",
        ),
        (dict(add_dummy_prefix=True), r"add_dummy_prefix .*: 'a reddish star' comes back as 'a red dish star'"),
        (dict(byte_fallback=False), r"byte_fallback is off: .* comes back as ' \u2047 "),
    ],
)
def test_a_model_that_loses_text_is_refused_or_says_how(settings, cause, tmp_path):
    file = tmp_path / "text.model"
    file.write_bytes(foreign(captions(100), **settings))
    with pytest.raises(ValueError, match="text.model: this text tokenizer loses text") as refused:
        TextTokenizer.load(file)
    tokenizer = TextTokenizer.load(file, lossy="warn")
    (loss,) = tokenizer.losses
    assert re.search(cause, str(loss)) and str(loss) in str(refused.value)
    assert tokenizer.decode(tokenizer.encode("a red star")) == "a red star"


def test_a_rule_that_no_probe_meets_is_found_in_the_settings(tmp_path):
    (tmp_path / "rules.tsv").write_text("71\t78\n")  # q -> x
    model = foreign(captions(100), normalization_rule_tsv=str(tmp_path / "rules.tsv"))
    (loss,) = TextTokenizer(model, lossy="warn").losses
    assert "rewrites characters" in loss.cause and not loss.text


def test_ids_of_a_foreign_model_that_text_can_and_cannot_spell():
    model = foreign(captions(100), control_symbols=["<boi>"], user_defined_symbols=["<image>", "\n"])
    assert reachable_symbols(model) == ["<image>"]
    tokenizer = TextTokenizer(model)
    ids = tokenizer.encode("<s> <boi> <image>\n")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model).id_to_piece(ids)
    assert "<image>" in pieces and not {"<s>", "<boi>", "<unk>"} & set(pieces)
    assert tokenizer.decode(ids) == "<s> <boi> <image>\n"
    assert tokenizer.piece_bytes[ids].sum() == len("<s> <boi> <image>\n")


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "text.model")
    loaded = TextTokenizer.load(tmp_path / "text.model")
    assert (loaded.hash, loaded.size) == (tokenizer.hash, tokenizer.size)
    assert [path.name for path in tmp_path.iterdir()] == ["text.model"]
    (tmp_path / "text.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        TextTokenizer.load(tmp_path / "text.model")
