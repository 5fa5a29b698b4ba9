"""Asks a trained model about held-out documents and counts what it got right.

The model is asked to draw the image of a text, to caption an image (with the same pairs, reversed), to edit an image as
a text says, and to answer a question about an image. In a story, it is asked to draw the next image, which the protocol
checks. All questions of one kind are sampled with one call of the engine. Conversations proceed turn by turn
(conversations.py). For other interleaved documents there is no checker, so the model is asked for the next image and
the next text, which are compared with the document's own. The tokenizer's scores are reported together with the
model's. If a checker fails on the reconstruction of a real image, it cannot pass a sampled image either, so
`reconstruction_exact` is the upper limit of `text_to_image_exact`.

Axes: H, W height and width of an image in pixels, h, w in codes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeGuard

import numpy as np
from ar_tokenizers.image.metrics import psnr

from ar_unified.data.images import ImageCodec, draws_none
from ar_unified.data.sources import BadItem, Source
from ar_unified.evaluation.conversations import converse, is_conversation
from ar_unified.evaluation.examples import ANSWERED_IN_WORDS, KINDS, Codec, Example, Scores
from ar_unified.evaluation.right_answers import Protocol, same_text, text_of
from ar_unified.language.document import CodesPart, Document, ImagePart, Part, TextPart
from ar_unified.language.grammar import Grammar
from ar_unified.language.reading import GrammarError
from ar_unified.manifests import Json
from ar_unified.sampling.decoding import Filter
from ar_unified.sampling.engine import Engine
from ar_unified.sampling.plan import Plan, prompt_tokens
from ar_unified.sampling.request import Request, RequestError, Sample

LIKELIEST_TEXT = Request("", (), text=Filter(temperature=0.0))
_SCAN = 16  # maximum number of items of a source that are tried for each needed document


def evaluate(
    engine: Engine,
    image_tokenizer: ImageCodec,
    grammar: Grammar,
    protocol: Protocol,
    sources: Sequence[Source],
    *,
    limit: int = 256,
    seed: int = 0,
    drawn: Request = LIKELIEST_TEXT,
    fit: Callable[[np.ndarray], np.ndarray] = lambda pixels: pixels,
    keep: int = 12,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[str, Any], list[Example]]:
    """Scores generation on held-out documents.

    Args:
        engine: the engine that samples from the model.
        image_tokenizer, grammar: the ones that the model was trained with. If the tokenizer cannot decode images,
            only questions with answers in words are asked.
        protocol: the checks that decide which answers are right.
        sources: sources of documents that the model has not seen; bad items are skipped and counted.
        limit: maximum number of documents of each kind, drawn from all sources by `seed`.
        seed: the seed for the choice of documents and for sampling.
        drawn: how answers are sampled: guidance and its context, temperature, top-k and top-p of both modalities. By
            default, images are sampled from the model's distribution, and texts are decoded greedily.
        fit: resizes an image as data preparation does, uint8 [H, W, 3] to uint8 [H', W', 3].
        keep: the first `keep` examples of each kind are returned, and at most half as many of the later failures.
        progress: called with (kind, number of questions done, number of all questions).

    Returns:
        Metrics and examples. Metrics: shares in [0, 1] `text_to_image_exact`, `image_to_text_exact` (and
        `image_to_text_exact/KIND`), `caption_exact`, `edit_exact` (and `edit_exact/KIND`), `story_change_exact`,
        `parse_rate` (of all sequences sampled here), `reconstruction_exact`, `story_reconstruction_exact`,
        `edit_reconstruction_exact`, `next_text_exact`, and what `converse` counts; mean PSNR in dB:
        `tokenizer_psnr` of the real images' reconstructions and `next_image_psnr` of the model's images, both against
        the real ones; `counts`, the number of questions of each metric; `skipped`, the number of left-out documents by
        reason. A metric is absent if nothing was asked for it. `note` says in words what was asked instead, if there
        were no captions, edits, questions or stories.
    """
    scores, skipped = Scores(), Counter[str]()
    documents = _collect(sources, limit, seed, fit, skipped)
    codec = Codec(image_tokenizer)
    codec.learn_pixels(p.pixels for group in documents.values() for d in group for p in d.parts if _is_image(p))

    kept: list[Example] = []
    asked_of = Counter[str]()  # number of questions that were asked, by kind
    for kind in KINDS if codec.draws else ANSWERED_IN_WORDS:
        asked: dict[str, Example] = {}
        requests: list[Plan] = []
        examples = list(_examples(kind, documents, protocol))
        budget = 8 + 2 * max((_length(grammar, e.expected) for e in examples if isinstance(e.expected, str)), default=0)
        for i, example in enumerate(examples):
            asking = replace(drawn, id=f"{kind}-{i}", seed=seed + i)
            plan = _plan(example, codec, grammar, engine, budget, asking)
            if plan is None:
                skipped["does_not_fit"] += 1
                continue
            asked[plan.request.id] = example
            requests.append(plan)
            asked_of[kind] += 1
        answers: dict[str, str | np.ndarray | None] = {}
        for sample in engine.generate(requests) if requests else ():
            scores.add("parse_rate", sample.document is not None)
            answers[sample.request.id] = _answer(sample, kind)
            if progress:
                progress(kind, len(answers), len(requests))
        codec.learn_codes(answer for answer in answers.values() if isinstance(answer, np.ndarray))
        done = [_judged(example, answers.get(id), codec, protocol, scores) for id, example in asked.items()]
        kept += _kept(done, keep)
    talks = documents.get("conversation", []) if codec.draws else []
    done = converse(engine, codec, grammar, protocol, talks, scores, skipped, drawn=drawn, seed=seed, progress=progress)
    asked_of["turn"], kept = len(done), kept + _kept(done, keep)

    metrics = _metrics(scores, codec, skipped)
    if note := "; ".join(filter(None, [_note(documents, asked_of, protocol, skipped), draws_none(image_tokenizer)])):
        metrics["note"] = note
    return metrics, kept


def _metrics(scores: Scores, codec: Codec, skipped: Counter[str]) -> dict[str, Json]:
    metrics = scores.metrics()
    for name, values in {"tokenizer_psnr": codec.psnr, "next_image_psnr": scores.psnr}.items():
        if values:
            metrics[name], metrics["counts"][name] = float(np.mean(values)), len(values)
    return metrics | {"skipped": dict(skipped)}


def _kept(done: list[Example], keep: int) -> list[Example]:
    """The first `keep` examples, and at most half as many of the later failures."""
    return done[:keep] + [e for e in done[keep:] if e.correct is False][: keep // 2]


# ---- what is asked -----------------------------------------------------------------------------------------


def _is_image(part: Part) -> TypeGuard[ImagePart]:
    return isinstance(part, ImagePart)


def _collect(
    sources: Sequence[Source],
    limit: int,
    seed: int,
    fit: Callable[[np.ndarray], np.ndarray],
    skipped: Counter[str],
) -> dict[str, list[Document]]:
    """Up to `limit` documents of each task (and of edits), equally from every source, in a random order by `seed`."""
    found: dict[str, list[Document]] = defaultdict(list)
    rng = np.random.default_rng(seed)
    for source in sources:
        mine = Counter[str]()
        for looked, index in enumerate(rng.permutation(len(source))[: _SCAN * limit]):
            if looked >= 2 * limit and min(mine.values(), default=0) >= limit:
                break  # a task that was not found by now is probably not in the source
            try:
                document = source[int(index)]
            except BadItem as error:
                skipped[error.kind] += 1
                continue
            task = _asked_for(document)
            mine[task] += 1
            if mine[task] <= limit:
                document = document.changed(lambda part: ImagePart(fit(part.pixels)) if _is_image(part) else part)  # type: ignore[union-attr]
                found[task].append(document)
    return {task: [group[i] for i in rng.permutation(len(group))[:limit]] for task, group in found.items()}


def _asked_for(document: Document) -> str:
    """The task of a document. It is "conversation" if the assistant has several turns, and "edit" if the prompt has
    images and asks for an image, because such an image has no caption.
    """
    if is_conversation(document):
        return "conversation"
    pictured = any(not isinstance(part, TextPart) for turn in document.asked for part in turn.parts)
    return "edit" if document.task == "text_to_image" and pictured else document.task


def _examples(kind: str, documents: Mapping[str, list[Document]], protocol: Protocol) -> Iterator[Example]:
    """The questions of one kind that can be made from the documents and that the protocol can judge."""
    if kind == "text_to_image":
        for d in documents.get("text_to_image", []):
            first = d.answer[0]
            if _is_image(first):
                yield Example(kind, d, d.asked[-1].parts, first.pixels)
    elif kind == "edit" and protocol.edit_matches:
        for d in documents.get("edit", []):
            if len(d.answer) == 1 and _is_image(d.answer[0]):
                yield Example(kind, d, d.asked[-1].parts, d.answer[0].pixels)
    elif kind == "image_to_text":
        for d in documents.get("image_to_text", []):
            yield Example(kind, d, d.asked[-1].parts, text_of(d, answer=True))
    elif kind == "caption" and protocol.caption_matches:
        for d in documents.get("text_to_image", []):
            if len(d.answer) == 1 and d.asked[-1].parts:
                yield Example(kind, d, d.answer, text_of(d, answer=False))
    elif kind == "story":
        for d in _stories(documents):
            if (at := _story(d, protocol)) is not None:
                yield Example(kind, d, d.parts[:at], d.parts[at].pixels)  # type: ignore[union-attr]
    elif kind in ("next_image", "next_text"):
        for d in _stories(documents):
            if _story(d, protocol) is None:
                wanted = ImagePart if kind == "next_image" else TextPart
                for at, part in enumerate(d.parts):  # the first image (or text) with something before it
                    if at and isinstance(part, wanted):
                        yield Example(kind, d, d.parts[:at], part.pixels if _is_image(part) else part.text)  # type: ignore[union-attr]
                        break


def _stories(documents: Mapping[str, list[Document]]) -> list[Document]:
    """The interleaved documents to ask about. Conversations are left out, because nothing says which turn to ask
    for."""
    return [document for document in documents.get("interleaved", []) if not document.asks]


def _story(document: Document, protocol: Protocol) -> int | None:
    """The index of the image in an interleaved document that the model is asked for; None if there is no image that
    the protocol can check.

    It is the second image, if a text between the first image and the second says what the second shows.
    """
    at = [i for i, part in enumerate(document.parts) if _is_image(part)]
    return at[1] if protocol.story_matches and len(at) > 1 and at[1] > at[0] + 1 else None


_LOOKED_FOR = "captions (a prompt that asks for an image), questions about an image, and stories"


def _note(
    documents: Mapping[str, list[Document]], asked: Counter[str], protocol: Protocol, skipped: Counter[str]
) -> str:
    """A note that says what was asked instead of the usual questions, and why; "" if the usual ones were asked."""
    if any(asked[kind] for kind in ("text_to_image", "edit", "image_to_text", "caption", "story", "turn")):
        return ""
    found = ", ".join(f"{len(group)} of kind {task}" for task, group in sorted(documents.items()) if group)
    left_out = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in skipped.items())
    note = f"looked for {_LOOKED_FOR} that the protocol {protocol.name!r} can judge; found "
    note += (f"documents: {found}" if found else "no documents") + (f" (left out: {left_out})" if left_out else "")
    if asked["next_image"] or asked["next_text"]:
        parts = f"{asked['next_image']} next images and {asked['next_text']} next texts"
        return f"{note}. Asked for the next part of interleaved documents instead: {parts}"
    return f"{note}. Nothing was asked: text alone has no right answer, and an interleaved document needs two parts"


def _length(grammar: Grammar, text: str) -> int:
    return len(grammar.text_codec.encode(text))


def _plan(
    example: Example,
    codec: Codec,
    grammar: Grammar,
    engine: Engine,
    budget: int,
    asking: Request,
) -> Plan | None:
    """The engine's plan for the question; None if an image is too large for the grammar, or the request is too long for
    the engine.

    `budget` is the maximum number of tokens of a text answer. It is more than any right answer needs, because a wrong
    answer that is cut off could otherwise look right.
    """
    parts = codec.encoded(example.prompt)
    document = example.document
    system = document.asked[:-1] if document.asks else ()
    request = replace(asking, parts=parts, history=system, turn=document.asks)
    try:
        if isinstance(example.expected, str):
            room = engine.max_length - len(prompt_tokens(grammar, request))
            if room < _length(grammar, example.expected) + 1:
                return None
            request = replace(request, mode="text", max_tokens=min(budget, room))
            if (behind := example.document.parts[len(parts) :][1:]) and example.kind == "next_text":
                # A text ends when the model begins the next image, so an image must be allowed, with room for it.
                (image,) = codec.encoded(behind[:1])
                budget += grammar.image_tokens(*image.codes.shape)  # type: ignore[union-attr]
                request = replace(request, mode="free", max_images=1, max_tokens=min(budget, room))
        else:
            height, width = codec.encode(example.expected).shape
            request = replace(request, mode="image", image_size=(height, width))
        return engine.plan(request)
    except (RequestError, GrammarError):
        return None


# ---- what came back ----------------------------------------------------------------------------------------


def _answer(sample: Sample, kind: str) -> str | np.ndarray | None:
    """The text, or the codes int32 [h, w] of the first image; None if the sequence did not parse."""
    if sample.document is None:
        return None
    parts = sample.document.parts
    if sample.request.mode == "image":
        return next((part.codes for part in parts if isinstance(part, CodesPart)), None)
    if kind == "next_text":  # a sequence that begins with an image has no next text
        parts = parts[:1]
    return " ".join(part.text for part in parts if isinstance(part, TextPart))


def _judged(
    example: Example, answer: str | np.ndarray | None, codec: Codec, protocol: Protocol, scores: Scores
) -> Example:
    """Adds the model's answer to the example, and counts it."""
    kind, document, expected = example.kind, example.document, example.expected
    if not isinstance(expected, np.ndarray):
        got = answer if isinstance(answer, str) else None
        if kind == "caption":
            assert protocol.caption_matches
            correct = got is not None and protocol.caption_matches(document, got)
            scores.add("caption_exact", correct)
        elif kind == "next_text":
            correct = got is not None and same_text(expected, got)
            scores.add("next_text_exact", correct)
        else:
            correct = got is not None and protocol.answer_matches(expected, got)
            scores.add("image_to_text_exact", correct)
            if group := protocol.question_kind(document):
                scores.add(f"image_to_text_exact/{group}", correct)
        return replace(example, got=got, correct=correct)

    image = codec.decode(answer) if isinstance(answer, np.ndarray) else None
    example = replace(example, got=image, reconstruction=codec.decode(codec.encode(expected)))
    check: Callable[[np.ndarray], bool] | None = None
    if kind == "story" and (story := protocol.story_matches) is not None:
        index = sum(_is_image(part) for part in example.prompt)
        before = [part.pixels for part in example.prompt if _is_image(part)][-1]
        check, names = (
            partial(story, document, index, before),
            ("story_change_exact", "story_reconstruction_exact"),
        )
    elif kind == "edit" and (edited := protocol.edit_matches) is not None:
        check, names = partial(edited, document), ("edit_exact", "edit_reconstruction_exact")
    elif kind == "text_to_image" and (shows := protocol.image_matches) is not None:
        check, names = partial(shows, document), ("text_to_image_exact", "reconstruction_exact")
    if kind == "next_image" and image is not None:
        scores.psnr.append(float(psnr(expected, image)))
    if check is None:
        return example
    correct = image is not None and check(image)
    scores.add(names[0], correct)
    if kind == "edit" and (group := protocol.edit_kind(document)):
        scores.add(f"{names[0]}/{group}", correct)
    scores.add(names[1], check(example.reconstruction))  # type: ignore[arg-type]
    return replace(example, correct=correct)
