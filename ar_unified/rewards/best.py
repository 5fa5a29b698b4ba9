"""Best of n: chooses the sample with the highest reward for each request, and makes preference pairs.

    best.jsonl         for each request, the chosen line of samples.jsonl, with its "reward" and the "rewards" of all
                       samples
    preferences.jsonl  {"prompt" or "messages", "chosen", "rejected"}: for each request, the answers with the highest
                       and the lowest reward, if these rewards differ
    unrewarded.jsonl   every sample without a reward, and the reason; other samples are not affected

All three files are in the folder of a finished job (sampling/job.py). Paths of images are relative to this folder.
Rejection sampling trains on best.jsonl, DPO on preferences.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ar_unified.data.images import decode
from ar_unified.language.document import Document, ImagePart, Part, TextPart, Turn
from ar_unified.manifests import Json
from ar_unified.rewards.reward import Failure, Reward, Verdict
from ar_unified.sampling import results
from ar_unified.workdir import write_text

NAMES = ("best.jsonl", "preferences.jsonl", "unrewarded.jsonl")
_TOGETHER = 32  # requests per call of the reward


@dataclass(frozen=True)
class BestReport:
    """What `keep_best` found.

    Attributes:
        requests: the number of requests with a chosen sample.
        pairs: the number of preference pairs.
        unrewarded: the number of samples without a reward.
        first: the first sample without a reward, and the reason; "" if there is none.
        best: the mean reward of the chosen samples.
        mean: the mean reward of all samples that have a reward.
    """

    requests: int
    pairs: int
    unrewarded: int
    first: str
    best: float
    mean: float

    def __str__(self) -> str:
        said = f"best of n: {self.requests} chosen samples, with a mean reward of {self.best:.4g}"
        said += f" (all samples: {self.mean:.4g}); {self.pairs} pairs of a better and a worse sample"
        return said + (
            f"; {self.unrewarded} samples have no reward, the first: {self.first}" if self.unrewarded else ""
        )


def keep_best(folder: str | Path, reward: Reward) -> BestReport:
    """Chooses among the samples of a finished job and writes the three files, each completely or not at all.

    If rewards are equal, the first sample is the best. A request without any rewarded sample is left out of best.jsonl
    and preferences.jsonl.
    """
    folder = Path(folder)
    rows = sorted(
        (row for row in results.read(folder) if row["sample"] is not None), key=lambda row: (row["line"], row["sample"])
    )
    chosen: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    lost: list[dict[str, Any]] = []
    every: list[float] = []
    for group, verdicts in _judged(
        folder, [list(group) for _, group in groupby(rows, lambda row: row["line"])], reward
    ):
        lost += [
            {"id": row["id"], "sample": row["sample"], "reason": verdict.reason}
            for row, verdict in zip(group, verdicts, strict=True)
            if isinstance(verdict, Failure)
        ]
        known = [(v, row) for v, row in zip(verdicts, group, strict=True) if not isinstance(v, Failure)]
        if not known:
            continue
        best, worst = max(known, key=lambda pair: pair[0]), min(known, key=lambda pair: pair[0])
        every += [value for value, _ in known]
        told = {str(row["sample"]): value for value, row in known}
        chosen.append(best[1] | {"reward": best[0], "rewards": told})
        if best[0] > worst[0]:
            more = {"id": best[1]["id"], "rewards": [best[0], worst[0]]}
            pairs.append(_prompt(group[0]) | {"chosen": _said(best[1]), "rejected": _said(worst[1])} | more)
    for name, found in zip(NAMES, (chosen, pairs, lost), strict=True):
        write_text(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))
    first = f"sample {lost[0]['sample']} of {lost[0]['id']!r}: {lost[0]['reason']}" if lost else ""
    best_mean = sum(row["reward"] for row in chosen) / max(len(chosen), 1)
    return BestReport(len(chosen), len(pairs), len(lost), first, best_mean, sum(every) / max(len(every), 1))


def _judged(
    folder: Path, groups: Sequence[list[dict[str, Any]]], reward: Reward
) -> Iterator[tuple[list[dict[str, Any]], list[Verdict]]]:
    """Yields, for each request, its lines and a verdict for each line. The verdict of a line with an error is a
    Failure.
    """
    for start in range(0, len(groups), _TOGETHER):
        some = groups[start : start + _TOGETHER]
        lines = [row for group in some for row in group if "error" not in row]
        prompts = [_document(folder, row["prompt"], row) for row in lines]
        answers = [
            Document.of(_parts(folder, row["segments"]), id=row["id"], meta={"sample": row["sample"]}) for row in lines
        ]
        said = iter(reward(prompts, answers))
        for group in some:
            yield group, [Failure(row["error"]) if "error" in row else next(said) for row in group]


def _document(folder: Path, prompt: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> Document:
    """The request as a document with an empty answer."""
    told = [(part.get("role", "user"), part) for part in prompt if part["type"] in ("text", "image")]
    turns = [
        Turn(role, _parts(folder, [part for _, part in parts]))  # type: ignore[arg-type]
        for role, parts in groupby(told, lambda pair: pair[0])
    ]
    turns = turns or [Turn("user")]
    return Document((*turns, Turn("assistant")), id=row["id"], meta=row.get("meta", {}))


def _parts(folder: Path, segments: Sequence[Mapping[str, Any]]) -> tuple[Part, ...]:
    return tuple(
        TextPart(part["text"]) if part["type"] == "text" else ImagePart(decode((folder / part["image"]).read_bytes()))
        for part in segments
    )


def _plain(segments: Sequence[Mapping[str, Json]]) -> Any:
    """Returns a single text as a string, and anything else as the parts that `language.rows.read_parts` reads."""
    if len(segments) == 1 and segments[0]["type"] == "text":
        return segments[0]["text"]
    keys = ("type", "text", "image")
    return [{key: part[key] for key in keys if key in part} for part in segments if part["type"] in ("text", "image")]


def _prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    prompt = row["prompt"]
    if not any("role" in part for part in prompt):
        return {"prompt": _plain(prompt)}
    turns = groupby(prompt, lambda part: part.get("role", "user"))
    return {"messages": [{"role": role, "content": _plain(list(parts))} for role, parts in turns]}


def _said(row: Mapping[str, Any]) -> Any:
    return _plain(row["segments"])
