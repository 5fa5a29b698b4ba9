"""Text comes back as it was, whatever it is; ids come back as some text, whatever they are."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import sentencepiece
from ar_tokenizers.text import TextTokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

WORDS = "a red blue green small large circle square triangle star left of above the and is there".split()


def captions(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=7)) + f", {draw.randrange(100)}.\n" for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(captions(300), vocab_size=384)


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("  a  \n\n\t\r\n ")
@example("\u2581")
@example(" \u2581\u2581 a\u2581 ")
@example("\u2585\0\ufffd\ufeff \u2047 ")
@example("<boi> <s> </s> <unk> <0x0A> <pad>")
@settings(max_examples=300, deadline=None)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 < id < tokenizer.size for id in ids)  # 0 is <unk>


def test_texts_encoded_apart_join_exactly(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a red") + tokenizer.encode("dish star")) == "a reddish star"


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
    tokenizer = TextTokenizer.train(texts, 300, max_texts=101)
    assert len(tokenizer.encode("early")) == len(tokenizer.encode("late")) == 1


def test_small_and_large_vocabularies():
    assert 259 < TextTokenizer.train(["abc abd"], 100_000).size < 300
    with pytest.raises(ValueError, match="vocab_size 260 is too small: this corpus needs at least 263"):
        TextTokenizer.train(["abc "], 260)


def test_long_texts_are_not_dropped():
    long = TextTokenizer.train(["circle square " * 20_000], 290)
    assert len(long.encode("circle")) == 1


def test_unigram_is_lossless_too():
    TextTokenizer.train(captions(300), 320, model_type="unigram")  # its constructor probes


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


@pytest.mark.parametrize(
    "settings", [{"normalization_rule_name": "nmt_nfkc"}, {"byte_fallback": False}, {"add_dummy_prefix": True}]
)
def test_a_model_that_loses_text_is_refused(settings, tmp_path):
    lossless = dict(
        normalization_rule_name="identity",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions(100)), model_writer=model, vocab_size=330, model_type="bpe",
        hard_vocab_limit=False, minloglevel=2, **(lossless | settings),
    )  # fmt: skip
    (tmp_path / "text.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match="text.model: this text model loses text"):
        TextTokenizer.load(tmp_path / "text.model")


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "text.model")
    loaded = TextTokenizer.load(tmp_path / "text.model")
    assert (loaded.hash, loaded.size) == (tokenizer.hash, tokenizer.size)
    assert [path.name for path in tmp_path.iterdir()] == ["text.model"]
    (tmp_path / "text.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="no SentencePiece model"):
        TextTokenizer.load(tmp_path / "text.model")
