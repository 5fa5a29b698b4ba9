"""Scores of an oracle with known mistakes: which answers count, which are left out, and which are asked together."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from ar_unified.data import edits, scenes
from ar_unified.data.sources import BadItem
from ar_unified.evaluation.generation import evaluate
from ar_unified.evaluation.right_answers import PROTOCOLS
from ar_unified.language.document import CodesPart, Document, ImagePart, TextPart
from ar_unified.language.grammar import Grammar
from ar_unified.language.syntax import fixed_grid
from ar_unified.language.vocabulary import Vocabulary
from ar_unified.sampling.request import Request, RequestError, Sample

NOTHING = np.full((32, 32, 3), scenes.BACKGROUND, np.uint8)


class Bytes:
    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode()


class Album:
    """An image tokenizer that gives every new image the next code. If `lossy`, all codes decode to an empty image."""

    def __init__(self, lossy=False):
        self.images, self.lossy = [NOTHING], lossy

    def encode(self, pixels):
        return np.array([[[self.code(image)]] for image in pixels], np.int32)

    def decode(self, codes):
        return np.stack([NOTHING if self.lossy else self.images[code] for code in codes.ravel()])

    def code(self, image):
        known = [i for i, other in enumerate(self.images) if np.array_equal(image, other)]
        if not known:
            self.images.append(image)
        return (known or [len(self.images) - 1])[0]


class Oracle:
    """An engine that knows the documents. `answer(request, truth)` may return something other than the truth."""

    def __init__(self, documents, album, answer=lambda request, truth: truth, max_length=1000):
        self.grammar = Grammar(Vocabulary(256, 256), fixed_grid(1, 1), Bytes())
        self.album, self.answer, self.max_length, self.calls = album, answer, max_length, []
        self.documents = [tuple(map(self.coded, document.parts)) for document in documents]

    def coded(self, part):
        return CodesPart(np.array([[self.album.code(part.pixels)]], np.int32)) if isinstance(part, ImagePart) else part

    def truth(self, request):
        n = len(request.parts)
        for parts in self.documents:
            for order in (parts, parts[::-1]) if request.turn else (parts,):
                if order[:n] == request.parts and len(order) > n:
                    return order[n]
        raise AssertionError(f"asked what no document says: {request}")

    def plan(self, request):
        if len(self.grammar.prompt(request.turns)) + 4 > self.max_length:
            raise RequestError("too long")
        return SimpleNamespace(request=request)

    def generate(self, plans):
        self.calls.append(len(plans))
        for request in (plan.request for plan in reversed(plans)):  # the order does not matter
            said = self.answer(request, self.truth(request))
            if said is None:
                yield Sample(request, 0, np.zeros(0, np.int32), None, "error", "broken")
            else:
                yield Sample(request, 0, np.zeros(0, np.int32), Document.of((said,)), "eos")


def make(n=6):
    rng = np.random.default_rng(0)
    documents = []
    for _ in range(n):
        scene = scenes.sample_scene(rng, "train")
        change = None
        while change is None:
            before = scenes.sample_scene(rng, "train")
            change = scenes.sample_change(rng, before, "train")
        image, first, second = (scenes.render(s, 32) for s in (scene, before, change.after))
        meta = {"scene": scenes.scene_to_json(scene)}
        question, answer = scenes.question(rng, scene, "train")
        story = (
            TextPart(scenes.caption(rng, before)),
            ImagePart(first),
            TextPart(change.text),
            ImagePart(second),
        )
        documents += [
            Document.of((TextPart(scenes.caption(rng, scene)), ImagePart(image)), 1, meta=meta),
            Document.of((ImagePart(image), TextPart(question), TextPart(answer)), 2, meta=meta),
            Document.of(story, meta={"scenes": [scenes.scene_to_json(s) for s in (before, change.after)]}),
        ]
    return documents


def run(documents, album=None, protocol="shapes", limit=100, asked=None, **options):
    """asked: settings for all requests of `evaluate`."""
    album = album or Album()
    oracle = Oracle(documents, album, **options)
    given = {"drawn": asked} if asked else {}
    metrics, kept = evaluate(oracle, album, oracle.grammar, PROTOCOLS[protocol], [documents], limit=limit, **given)
    return metrics, kept, oracle


def test_every_request_is_drawn_as_told():
    asked = Request("", (), guidance=3.0, image_guidance=1.2, context="bos_boi", repetition_penalty=1.3)
    requests = []

    def answer(request, truth):
        requests.append(request)
        return truth

    run(make(2), asked=asked, answer=answer)
    settings = ("guidance", "image_guidance", "context", "repetition_penalty", "text", "image")
    assert {tuple(getattr(request, name) for name in settings) for request in requests} == {
        tuple(getattr(asked, name) for name in settings)
    }
    assert len({request.id for request in requests}) == len(requests) > 5


def test_an_oracle_is_right_everywhere_and_every_number_has_its_count():
    metrics, kept, oracle = run(make())
    counts = metrics["counts"]
    shares = {"text_to_image_exact", "image_to_text_exact", "caption_exact", "story_change_exact"}
    for name in (*shares, "reconstruction_exact", "story_reconstruction_exact"):
        assert (metrics[name], counts[name]) == (1.0, 6), name
    assert (metrics["parse_rate"], counts["parse_rate"]) == (1.0, 24)
    assert sum(n for name, n in counts.items() if name.startswith("image_to_text_exact/")) == 6
    assert metrics["tokenizer_psnr"] == 100 and metrics["skipped"] == {}
    assert oracle.calls == [6, 6, 6, 6]  # one call per kind
    assert {e.kind for e in kept} == {"text_to_image", "image_to_text", "caption", "story"}
    assert all(e.correct for e in kept)


def test_mistakes_and_broken_sequences_count_as_wrong():
    def answer(request, truth):
        if request.mode == "image":
            return None if request.id == "text_to_image-0" else CodesPart(np.zeros((1, 1), np.int32))
        return TextPart(truth.text + " indeed") if request.id.endswith("-1") else truth

    metrics, kept, _ = run(make(), answer=answer)
    assert metrics["text_to_image_exact"] == metrics["story_change_exact"] == 0
    assert metrics["reconstruction_exact"] == 1
    assert metrics["image_to_text_exact"] == pytest.approx(5 / 6)
    assert metrics["parse_rate"] == pytest.approx(23 / 24)
    assert [e.got is None for e in kept if e.kind == "text_to_image"].count(True) == 1


def test_an_unchanged_image_is_not_the_next_one_of_a_story():
    repeat = lambda request, truth: request.parts[1] if request.id.startswith("story") else truth  # noqa: E731
    assert run(make(), answer=repeat)[0]["story_change_exact"] == 0


def edited(n=6):
    """A picture, an instruction, and the picture that the instruction asks for."""
    rng, documents = np.random.default_rng(1), []
    for _ in range(n):
        edit = edits.sample_edit(rng, "train")
        before, after = (ImagePart(scenes.render(scene, 32)) for scene in (edit.before, edit.after))
        meta = {"scene": scenes.scene_to_json(edit.before), "edited_scene": scenes.scene_to_json(edit.after)}
        documents.append(Document.of((TextPart(edit.instruction), before, after), 2, meta=meta))
    return documents


def test_edits_are_asked_for_by_themselves_and_counted_by_kind():
    metrics, kept, oracle = run(edited())
    counts = metrics["counts"]
    assert metrics["edit_exact"] == metrics["edit_reconstruction_exact"] == 1 and counts["edit_exact"] == 6
    kinds = {name: n for name, n in counts.items() if name.startswith("edit_exact/")}
    assert sum(kinds.values()) == 6 and len(kinds) >= 3
    assert {"text_to_image_exact", "caption_exact"}.isdisjoint(metrics), "nobody knows the captions of edits"
    assert oracle.calls == [6] and {e.kind for e in kept} == {"edit"} and "note" not in metrics


def test_an_edit_that_changes_nothing_is_wrong():
    assert run(edited(), answer=lambda request, truth: request.parts[1])[0]["edit_exact"] == 0


def test_edits_are_no_questions_for_a_protocol_that_cannot_judge_them():
    assert not run(edited(), protocol="exact")[0]["counts"].get("edit_exact")


def test_the_tokenizer_is_told_from_the_model():
    metrics, _, _ = run(make(), album=Album(lossy=True))
    assert metrics["reconstruction_exact"] == metrics["story_reconstruction_exact"] == 0
    assert metrics["tokenizer_psnr"] < 30 and metrics["image_to_text_exact"] == 1


def test_what_does_not_fit_is_left_out_and_said():
    metrics, _, oracle = run(make(), max_length=100)
    assert metrics["skipped"]["does_not_fit"] == 24 - metrics["counts"]["parse_rate"] > 0
    assert sum(oracle.calls) == metrics["counts"]["parse_rate"]


def test_limit_seed_and_bad_items():
    class Source(list):
        def __getitem__(self, i):
            if i % 3 == 2:
                raise BadItem("unreadable_image", f"here:{i}", "cut in half")
            return super().__getitem__(i)

    first, kept, _ = run(Source(make(12)), limit=4)
    again, same, _ = run(Source(make(12)), limit=4)
    assert first == again and [e.document for e in kept] == [e.document for e in same]
    assert first["counts"]["text_to_image_exact"] == first["counts"]["image_to_text_exact"] == 4
    assert first["skipped"]["unreadable_image"] > 0 and "story_change_exact" not in first


def test_without_a_checker_images_are_drawn_but_not_scored():
    metrics, kept, _ = run(make(), protocol="exact")
    assert "text_to_image_exact" not in metrics and metrics["image_to_text_exact"] == 1
    assert {e.correct for e in kept if e.kind == "text_to_image"} == {None}


# ---- interleaved documents that no checker knows ------------------------------------------------------------------


def pages(n=4):
    """Text, image, text, as in a folder of recipes."""
    documents = make(n)[2::3]
    return [Document.of((*d.parts[:2], TextPart(f"then {i}"))) for i, d in enumerate(documents)]


def test_of_interleaved_documents_alone_the_next_parts_are_asked():
    metrics, kept, oracle = run(pages(), protocol="exact")
    assert metrics["counts"] == {"parse_rate": 8, "next_text_exact": 4, "tokenizer_psnr": 4, "next_image_psnr": 4}
    assert metrics["next_text_exact"] == metrics["parse_rate"] == 1 and metrics["next_image_psnr"] == 100
    assert [(e.kind, len(e.prompt)) for e in kept] == [("next_image", 1)] * 4 + [("next_text", 2)] * 4
    assert oracle.calls == [4, 4]
    note = metrics["note"]
    assert "looked for captions" in note and "'exact'" in note and "4 of kind interleaved" in note
    assert "4 next images and 4 next texts" in note


def test_a_wrong_next_part_is_counted_as_wrong():
    def answer(request, truth):
        return TextPart("no") if request.id == "next_text-0" else CodesPart(np.zeros((1, 1), np.int32)) if (
            request.mode == "image"
        ) else truth  # fmt: skip

    metrics, _, _ = run(pages(), protocol="exact", answer=answer)
    assert metrics["next_text_exact"] == 3 / 4 and metrics["next_image_psnr"] < 30


def test_a_next_text_may_end_where_a_image_begins():
    """The document continues after the text, so the model may begin the image and has room for it."""
    asked = []

    def answer(request, truth):
        asked.append(request)
        return truth

    documents = [Document.of((*d.parts, d.parts[1])) for d in pages()]
    metrics, _, _ = run(documents, protocol="exact", answer=answer)
    texts = [request for request in asked if request.id.startswith("next_text")]
    assert metrics["next_text_exact"] == 1 and {request.mode for request in texts} == {"free"}
    assert all(request.max_images == 1 and request.max_tokens >= 3 + len("then 0") for request in texts)
    begins_with_a_image = lambda request, truth: CodesPart(np.zeros((1, 1), np.int32))  # noqa: E731
    assert run(documents, protocol="exact", answer=begins_with_a_image)[0]["next_text_exact"] == 0


def test_stories_that_a_protocol_checks_are_not_asked_twice():
    metrics, kept, _ = run(make()[2::3])
    assert metrics["story_change_exact"] == 1 and {e.kind for e in kept} == {"story"} and "note" not in metrics


def test_nothing_to_ask_is_said_with_what_was_looked_for():
    metrics, kept, oracle = run([Document.of((TextPart("only words"),))] * 3, protocol="exact")
    assert metrics["counts"] == {} and not kept and not oracle.calls
    assert "found documents: 3 of kind text. Nothing was asked" in metrics["note"]
