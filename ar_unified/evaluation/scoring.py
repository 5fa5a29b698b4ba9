"""Writes the likelihood of documents under a model as lines of JSON: in total, by part and by modality.

    {"line": 3, "id": "3", "origin": "a.jsonl:3", "log_likelihood": -41.2, "tokens": 19, "greedy": false,
     "text": {"log_likelihood": -9.1, "tokens": 3}, "image": {...}, "parts": [{"type": "image", ...}], "eos": {...}}
    {"line": 4, ..., "chosen": {...}, "rejected": {...}, "margin": 2.5}           for a preference pair
    {"line": 5, "origin": "a.jsonl:5", "error": "missing_image: ..."}

Log-likelihoods are in nats, with teacher forcing, and conditioned on everything before (`sampling.score`). In a
document with turns, only the last answer is scored; in any other document, all parts are scored. The token that ends a
sequence has its own entry and is not part of any sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ar_unified import progress
from ar_unified.data.images import by_size
from ar_unified.data.sources import BadItem, Source, read
from ar_unified.errors import UserError
from ar_unified.evaluation.unfinished import Unfinished
from ar_unified.language.document import CodesPart, Document, ImagePart, TextPart
from ar_unified.language.reading import GrammarError
from ar_unified.manifests import Json
from ar_unified.sampling.model import Model
from ar_unified.sampling.score import Score, pieces

_AT_ONCE = 256  # number of items whose images are encoded together and whose answers are batched by length


@dataclass
class Scoring:
    """What `score_source` did: how many documents it scored (two for a preference pair), how many items it left out,
    and why it left out the first of them. `found` counts items that an earlier process had scored.
    """

    documents: int = 0
    tokens: int = 0
    log_likelihood: float = 0.0
    errors: int = 0
    first_error: str = ""
    found: int = 0

    def count(self, row: Mapping[str, Any]) -> None:
        """Counts what one line of the output says."""
        if "error" in row:
            self.errors += 1
            self.first_error = self.first_error or f"{row['origin']}: {row['error']}"
            return
        for told in (row["chosen"], row["rejected"]) if "chosen" in row else (row,):
            self.documents += 1
            self.tokens += told["tokens"]
            self.log_likelihood += told["log_likelihood"]

    def __str__(self) -> str:
        mean = f"{self.log_likelihood / max(self.tokens, 1):.4f}"
        said = f"{self.documents} documents, {self.tokens} tokens, {mean} nats a token"
        said += f" ({self.found} items were scored before)" if self.found else ""
        return said + (f"; {self.errors} left out, the first: {self.first_error}" if self.errors else "")


def score_source(model: Model, source: Source, output: str | Path, *, show_progress: bool = True) -> Scoring:
    """Writes a line for every item of a source to `output`, in order. The file appears whole or not at all.

    If the process is killed, its lines stay in a folder next to `output` (`unfinished`), and the same call continues
    from there.

    Raises UserError if `output` exists, or if the unfinished lines belong to another model or other data. Raises
    OSError if a file cannot be written.
    """
    done = Scoring()
    facts = {"weights": model.weights, "max_length": model.engine.max_length, "data": dict(source.fingerprint)}
    with (
        Unfinished(output, facts, _AT_ONCE) as lines,
        progress.bar(len(source), "items", "score", shown=show_progress) as bar,
    ):
        for row in lines.rows():
            done.count(row)
        done.found = lines.done
        bar.update(lines.done)
        items = read(source, range(lines.done, len(source)))
        while chunk := list(islice(items, _AT_ONCE)):
            rows = list(_rows(model, source, chunk))
            lines.add(rows)
            for row in rows:
                done.count(row)
            bar.update(len(chunk))
        lines.finish()
    return done


def _rows(model: Model, source: Source, chunk: Sequence[tuple[int, Document | BadItem]]) -> Iterator[dict[str, Json]]:
    good = [(number, item) for number, item in chunk if isinstance(item, Document)]
    bad = {number: item for number, item in chunk if isinstance(item, BadItem)}
    wanted: dict[int, tuple[Document, ...]] = {}
    for (number, _), document in zip(good, _coded(model, [document for _, document in good]), strict=True):
        try:
            for answered in document.answered:
                _require_room(model, answered)
            wanted[number] = document.answered
        except (GrammarError, UserError) as error:
            bad[number] = BadItem("not_scored", source.origin(number), str(error))
    found = iter(model.score(answered for answers in wanted.values() for answered in answers))
    for number, _ in chunk:
        head: dict[str, Json] = {"line": number + 1, "origin": source.origin(number)}
        if number in bad:
            yield head | {"error": f"{bad[number].kind}: {bad[number].reason}"}
            continue
        scored = [(document, next(found)) for document in wanted[number]]
        head |= {"id": scored[0][0].id} if scored[0][0].id else {}
        told = [_told(*each) for each in scored]
        if len(told) == 1:
            yield head | told[0]
        else:
            margin = told[0]["log_likelihood"] - told[1]["log_likelihood"]
            yield head | {"chosen": told[0], "rejected": told[1], "margin": margin}


def _require_room(model: Model, document: Document) -> None:
    tokens, most = sum(map(len, pieces(model.grammar, document))), model.engine.max_length
    if tokens > most:
        raise UserError(f"expected at most {most} tokens (sampling.max_length), found {tokens}")


def _coded(model: Model, documents: Sequence[Document]) -> list[Document]:
    """The documents with images as codes; images of one size are encoded in batches."""
    images: list[np.ndarray] = []

    def kept(part: object) -> Any:
        images.extend([part.pixels] if isinstance(part, ImagePart) else [])
        return part

    for document in documents:
        document.changed(kept)
    codes = iter(by_size(model.image_tokenizer.encode, [model.resize(pixels) for pixels in images]))
    return [
        document.changed(lambda part: CodesPart(next(codes)) if isinstance(part, ImagePart) else part)
        for document in documents
    ]


def _told(document: Document, score: Score) -> dict[str, Any]:
    """A Score as JSON values."""
    kinds = ["text" if isinstance(part, TextPart) else "image" for part in document.answer]
    parts = [{"type": kind, **asdict(part)} for kind, part in zip(kinds, score.parts, strict=True)]
    whole: dict[str, Json] = {"log_likelihood": score.log_likelihood, "tokens": score.tokens}
    whole["greedy"] = all(part.greedy for part in score.parts)
    for kind in dict.fromkeys(kinds):
        own = [part for part in parts if part["type"] == kind]
        whole[kind] = {key: sum(part[key] for part in own) for key in ("log_likelihood", "tokens")}
    return whole | {"parts": parts, "eos": asdict(score.eos)}
