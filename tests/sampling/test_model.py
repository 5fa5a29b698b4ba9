"""The interface for notebooks: a loaded bundle draws, answers and scores like an engine of the same parts."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ar_unified
from ar_unified.bundle import BundleError
from ar_unified.errors import UserError
from ar_unified.language.document import CodesPart, Document, ImagePart, TextPart, Turn
from ar_unified.model.transformer import Transformer
from ar_unified.sampling.decoding import Filter
from ar_unified.sampling.engine import Engine
from ar_unified.sampling.request import Request, RequestError
from tests.bundles import grey, parts, write

PROMPT = "A small red star in the top left."


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bundles")
    return {layout: write(root / layout, layout).folder for layout in ("grid", "rows", "none")}


@pytest.fixture(scope="module")
def model(folders):
    return ar_unified.load(folders["grid"], batch_size=4)


@pytest.fixture(scope="module")
def own(model):
    """An engine of the bundle's original parts, but with the loaded grammar, so that programs compile only once."""
    of = parts("grid")
    assert model.grammar.manifest() == of["grammar"].manifest()
    return Engine(of["config"], of["params"], model.grammar, batch_size=4, max_length=64)


def test_images_are_those_of_the_parts_it_was_made_of(model, own):
    request = Request("", (TextPart(PROMPT),), mode="image", seed=3, n=3)
    samples = sorted(own.generate([request]), key=lambda sample: sample.index)
    decode = parts("grid")["image_tokenizer"].decode
    expected = [decode(sample.document.parts[0].codes[None])[0] for sample in samples]
    drawn = model.draw(PROMPT, seed=3, n=3)
    assert all(isinstance(image, Image.Image) and image.size == (16, 16) for image in drawn)
    for image, pixels in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(image), pixels)
    assert model.draw(PROMPT, seed=3)[0].tobytes() == drawn[0].tobytes(), "however many are drawn"
    assert {image.tobytes() for image in model.draw(PROMPT, seed=4, n=3)} != {image.tobytes() for image in drawn}


def test_a_request_that_says_nothing_is_drawn_with_what_the_bundle_says(folders, tmp_path):
    sampling = parts()["sampling"] | {"guidance": 3.0, "context": "bos_boi", "image": {"temperature": 0.5, "top_k": 7}}
    loaded = ar_unified.load(write(tmp_path / "b", sampling=sampling | {"kv_dtype": "int8"}).folder, batch_size=2)
    request = loaded.request(PROMPT, mode="image", seed=1)
    assert (request.guidance, request.context, request.image) == (3.0, "bos_boi", Filter(0.5, 7))
    assert request.text == Filter(0.0) and loaded.engine.kv_dtype == "int8" and loaded.engine.max_length == 64
    mine = loaded.request(PROMPT, guidance=1, image=Filter(top_p=0.5), text={"temperature": 0.2}, stop="a")
    assert mine.guidance == 1 and mine.image == Filter(1.0, 0, 0.5) and mine.text.temperature == 0.2
    other = ar_unified.load(folders["grid"], max_length=32, kv_dtype="bfloat16", dtype="bfloat16").engine
    assert (other.max_length, other.kv_dtype, other.config.dtype) == (32, "bfloat16", "bfloat16")


def test_answers_are_text_and_a_chat_has_turns(model, own):
    image = Image.fromarray(grey())
    codes = model.tokenize_image(grey())
    greedy = Filter(temperature=0.0)
    asked = Request("", (CodesPart(codes), TextPart("red")), mode="text", text=greedy, max_tokens=9)
    (sample,) = own.generate([asked])
    expected = "".join(part.text for part in sample.document.parts)
    assert expected and model.ask(image, "red", max_tokens=9) == expected == model.ask(grey(), "red", max_tokens=9)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "red"}]
    said = model.chat([{"role": "user", "content": content}], mode="text", max_tokens=9)
    assert said == {"role": "assistant", "content": expected}
    drawn = model.chat([{"role": "user", "content": PROMPT}], mode="image", seed=3)
    (part,) = drawn["content"]
    assert part["image"].tobytes() == model.draw(PROMPT, seed=3)[0].tobytes()
    turns = [{"role": "user", "content": content}, said, {"role": "user", "content": "blue"}]
    history = Turn("user", (CodesPart(codes), TextPart("red"))), Turn("assistant", (TextPart(expected),))
    (sample,) = own.generate([replace(asked, history=history, parts=(TextPart("blue"),))])
    answer = "".join(part.text for part in sample.document.parts)
    assert model.chat(turns, mode="text", max_tokens=9)["content"] == answer
    with pytest.raises(
        RequestError, match="turns: expected turns that alternate between user.*found user, assistant, assis"
    ):
        model.chat(turns[:2])
    with pytest.raises(RequestError, match='messages 0: content 0: expected type "text" or "image", found'):
        model.chat([{"role": "user", "content": [{"type": "audio"}]}])


def test_a_conversation_reads_what_is_new(model):
    first = dict(mode="text", max_tokens=5)
    talk = model.conversation()
    assert talk.say("red", **first) == model.chat([{"role": "user", "content": "red"}], **first)
    before = len(talk.conversation.tokens)
    (drawn,) = talk.say(grey(), mode="image", seed=3)["content"]
    assert drawn["image"].size == (16, 16) and len(talk.conversation.turns) == 4
    assert talk.conversation.prefilled[0] <= len(talk.conversation.tokens) - before
    with pytest.raises(RequestError, match="begin another conversation"):
        talk.say("a" * 60)


def test_requests_and_scores_take_pixels(model, own):
    document = Document.of((ImagePart(grey()), TextPart("red star")), prompt=1)
    coded = Document.of((CodesPart(model.tokenize_image(grey())), TextPart("red star")), prompt=1)
    assert model.score([document]) == own.score([coded])
    request = Request("a", document.parts[:1], mode="text", max_tokens=5)
    assert model.score([(request, (TextPart("red star"),))]) == model.score([document])
    (found,), (expected,) = (
        list(engine.generate([Request("a", each.parts[:1], mode="text", max_tokens=5, text=Filter(0.0))]))
        for engine, each in ((model, document), (own, coded))
    )
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(model.encode(document), parts()["grammar"].encode(coded).tokens)
    assert model.parse(model.encode(document)) == coded


def test_logits_are_those_of_the_forward_pass_over_the_ids_that_are_used(model):
    ids = model.encode(Document.of((TextPart(PROMPT),)))
    tokens = np.stack([ids, ids[::-1]])
    found = model.logits(tokens)
    config, params, vocabulary = parts()["config"], parts()["params"], parts()["grammar"].vocabulary
    transformer = Transformer.bind(config, params)
    positions = jnp.broadcast_to(jnp.arange(len(ids)), tokens.shape)
    expected = transformer.logits(transformer(jnp.asarray(tokens), positions, jnp.zeros_like(tokens)))
    assert found.dtype == np.float32 and found.shape == (2, len(ids), vocabulary.used)
    np.testing.assert_allclose(found, expected[..., : vocabulary.used], rtol=1e-5, atol=1e-4)
    for wrong in (ids, tokens * 1.0, tokens + vocabulary.used, tokens[:0]):
        with pytest.raises(ValueError, match="tokens: expected"):
            model.logits(wrong)


def test_images_become_codes_and_come_back(model):
    codes = model.tokenize_image(Image.fromarray(grey()))
    assert codes.dtype == np.int32 and codes.shape == (2, 2)
    np.testing.assert_array_equal(codes, model.tokenize_image(grey()))
    assert model.detokenize_image(codes).shape == (16, 16, 3)
    with pytest.raises(ValueError, match=r"image: expected uint8 \[H, W, 3\], found float64"):
        model.tokenize_image(grey() / 255)


def test_sizes_are_in_pixels(folders):
    model = ar_unified.load(folders["rows"], batch_size=2)
    assert model.tokenize_image(grey(40, 20)).shape == (3, 1), "about 16 x 16 pixels, of the image's own aspect"
    assert model.request(PROMPT, image_size=(32, 16)).image_size == (4, 2)
    with pytest.raises(RequestError, match="image_size: expected .* multiples of 8, found 20"):
        model.draw(PROMPT, size=20)


def test_text_alone(folders):
    model = ar_unified.load(folders["none"], batch_size=2)
    (score,) = model.score([Document.of((TextPart("red"), TextPart("star")), prompt=1)])
    assert score.log_likelihood < 0
    with pytest.raises(RequestError, match="this model was trained on text alone"):
        model.draw("a star")
    with pytest.raises(UserError, match="expected text alone, found an image"):
        model.ask(grey(), "red")


@pytest.mark.slow
def test_images_of_any_size_and_text_alone(folders):
    model = ar_unified.load(folders["rows"], batch_size=2)
    (tall,) = model.draw(PROMPT, size=(32, 16))
    (square,) = model.draw(PROMPT, size=24)
    assert (tall.size, square.size) == ((16, 32), (24, 24))
    model = ar_unified.load(folders["none"], batch_size=2)
    answer = model.ask("red", max_tokens=6)
    assert answer and model.chat([{"role": "user", "content": "red"}], max_tokens=6)["content"] == answer


@pytest.mark.slow
def test_a_mesh_draws_what_one_device_draws(folders, model):
    wide = ar_unified.load(folders["grid"], {"data": -1, "tensor": 2})
    assert dict(wide.engine.mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2, "context": 1}
    query = wide.engine.params["layers"][0]["attention"]["query"]
    assert query.addressable_shards[0].data.shape == (32, 2 * 8), "restored straight to its shards"
    assert [x.tobytes() for x in wide.draw(PROMPT, seed=3, n=2)] == [
        x.tobytes() for x in model.draw(PROMPT, seed=3, n=2)
    ]
    np.testing.assert_allclose(wide.logits([[1, 2, 3]]), model.logits([[1, 2, 3]]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(mesh={"tensor": 3}), "mesh .*tensor=3"),
        (
            dict(mesh={"data": -1}, batch_size=6),
            "batch_size: expected a multiple of the mesh's 8 data devices, found 6",
        ),
        (dict(kv_dtype="int4"), "kv_dtype: expected one of .*int8.*; found 'int4'"),
        (dict(dtype="float8"), "dtype: expected one of float32, bfloat16; found 'float8'"),
    ],
)
def test_a_setting_that_does_not_fit_is_said(folders, settings, words):
    with pytest.raises(UserError, match=words):
        ar_unified.load(folders["grid"], **settings)


def test_what_cannot_be_drawn_is_said(model):
    with pytest.raises(RequestError, match="max_length is 64"):
        model.draw(PROMPT * 9)
    with pytest.raises(RequestError, match="unknown key 'guidence'"):
        model.draw(PROMPT, guidence=3)
    with pytest.raises(RequestError, match="colour: there is no such setting"):
        model.draw(PROMPT, colour="red")
    with pytest.raises(BundleError):
        ar_unified.load("nowhere")
