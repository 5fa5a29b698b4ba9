"""Writes report.html, a self-contained page that shows what a run made and how good it is.

It has numbers with their thresholds, samples with their prompts and the checker's verdict, reconstructions, training
curves, the whole evaluation as a table, and facts about the machine. It needs no other file, font or script. It can be
read on a phone, in light and dark mode, and with scripts switched off.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ar_unified.evaluation.charts import line_chart, number
from ar_unified.evaluation.examples import Example
from ar_unified.evaluation.facts import PARTS, environment, summary
from ar_unified.evaluation.figures import figure, sample_sections
from ar_unified.evaluation.sheets import section
from ar_unified.manifests import Json
from ar_unified.metrics import (
    ATTENTION,
    LOG_Z_BY_ROLE,
    LOGPS,
    LOSS_BY_ROLE,
    LOSS_BY_TASK,
    LOSS_OF_CHOSEN,
    REWARDS,
    TOKENS_PER_SECOND,
    VALIDATION,
    read_metrics,
    turned,
)
from ar_unified.workdir import write_text

LEAD = "One transformer over text and image tokens: what it generates, and how good that is."
TOKENIZER_LEAD = "An image tokenizer: what it keeps of images, and how its codes are used."
HELD_OUT = "held out"  # the name of the set whose numbers are at the top level of an evaluation
NAMES = {
    "text_to_image_exact": "Text to image",
    "image_to_text_exact": "Image to text",
    "vqa_accuracy": "Questions answered",
    "caption_exact": "Captions",
    "edit_exact": "Edits",
    "turn_exact": "Turns of conversations",
    "conversation_exact": "Whole conversations",
    "story_change_exact": "Stories",
    "next_text_exact": "Next texts",
    "next_image_psnr": "Next images, PSNR",
    "parse_rate": "Sequences that parse",
    "reconstruction_exact": "Reconstructions",
    "story_reconstruction_exact": "Reconstructions in stories",
    "edit_reconstruction_exact": "Reconstructions of edits",
    "turn_reconstruction_exact": "Reconstructions in conversations",
    "tokenizer_psnr": "Tokenizer PSNR",
}
MEANINGS = {
    "text_to_image_exact": "generated images that show everything that their text says",
    "image_to_text_exact": "questions about an image answered exactly",
    "vqa_accuracy": "questions about an image answered exactly",
    "caption_exact": "captions that describe their image",
    "edit_exact": "edited images that have the change that was asked for, and no other change",
    "turn_exact": "answers, text or image, that are right, given the model's own earlier answers",
    "conversation_exact": "conversations in which all answers are right",
    "story_change_exact": "next images that show the change that the text describes",
    "next_text_exact": "next texts of interleaved documents that equal the document's own",
    "parse_rate": "sampled sequences that parse as documents",
    "reconstruction_exact": "real images that pass the checker after the tokenizer: the upper limit of text to image",
}


def write_report(
    path: str | Path,
    *,
    title: str,
    evaluation: Mapping[str, Any],
    examples: Mapping[str, Sequence[Example]] | None = None,
    sheets: Mapping[str, np.ndarray] | None = None,
    telemetry: Mapping[str, str | Path | Sequence[Mapping[str, Any]]] | None = None,
    thresholds: Mapping[str, float] | None = None,
    config: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
    parts: Collection[str] = PARTS,
) -> None:
    """Writes the page, whole or not at all.

    Args:
        path: the path of the HTML file.
        title: the experiment's name.
        evaluation: metrics as returned by generation.evaluate; further held-out sets are nested mappings by name. Other
            numbers (validation losses) are flat or nested. "tokenizer" has the numbers of tokenizer.evaluate_tokenizer
            by set.
        examples: the examples of each set, by its name; the name "" or "held out" means the first set.
        sheets: for each set, the images of evaluate_tokenizer.
        telemetry: for each model, "image_tokenizer" and "transformer", a metrics.jsonl (which may be missing) or its
            rows.
        thresholds: the value that a metric should reach, by the metric's name.
        config: the whole config as JSON values.
        facts: short facts by name for the top of the page, in addition to the config's summary.
        seconds: the wall time of each stage by name, in order.
        parts: the parts of the config that the page's first lines tell (`facts.summary`).
    """
    scores = evaluation.get("tokenizer", {})
    sets = _sets({key: value for key, value in evaluation.items() if key != "tokenizer"})
    curves = {name: _rows(rows) for name, rows in (telemetry or {}).items()}
    galleries = {name or HELD_OUT: list(group) for name, group in (examples or {}).items()}
    tokenizer = section(scores, sheets or {})
    sections = [
        ("Numbers", _headline(sets, thresholds or {})),
        *sample_sections(galleries),
        ("Image tokenizer", _tokenizer(galleries, curves.get("image_tokenizer", []), sets, tokenizer)),
        ("Transformer", _transformer(curves.get("transformer", []))),
        ("Evaluation", _table(sets, thresholds or {})),
        ("The run", _run(config or {}, seconds or {})),
    ]
    sections = [(name, body) for name, body in sections if body]
    links = "".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name, _ in sections)
    body = "".join(f'<section id="{_anchor(name)}"><h2>{escape(name)}</h2>{html}</section>' for name, html in sections)
    here = files("ar_unified.evaluation")
    style, script = (here.joinpath(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    lead = TOKENIZER_LEAD if evaluation.keys() == {"tokenizer"} else LEAD
    head = _facts({**summary(config or {}, parts), **(facts or {})})
    write_text(
        path,
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}: ar_unified</title><style>{style}</style></head>
<body><main><header><h1>{escape(title)}</h1>
<p class="lead">{lead}</p>
{head}</header><nav>{links}</nav>{body}</main>
<script>{script}</script></body></html>
""",
    )


# ---- numbers -----------------------------------------------------------------------------------------------


def _sets(evaluation: Mapping[str, Json]) -> dict[str, dict[str, Json]]:
    """Flat metrics of each held-out set; the set at the top level is first. A nested mapping without `counts` is not a
    set."""
    top: dict[str, Json] = {}
    others: dict[str, dict[str, Json]] = {}
    for key, value in evaluation.items():
        if not isinstance(value, Mapping) or key in ("counts", "skipped"):
            top[key] = value
        elif "counts" in value:
            others[key.replace("_", " ")] = dict(value)
        else:
            top |= {f"{key}/{inner}": v for inner, v in value.items()}
    return {HELD_OUT: top, **others}


def _headline(sets: Mapping[str, Mapping[str, Any]], thresholds: Mapping[str, float]) -> str:
    """A card for every metric with a threshold, and for every other metric that MEANINGS explains."""
    first, others = next(iter(sets.values())), list(sets.items())[1:]
    doubled = "vqa_accuracy" in first and "image_to_text_exact" not in thresholds  # both are the same number
    shown = [
        key for key in NAMES if isinstance(first.get(key), (int, float)) and (key in thresholds or key in MEANINGS)
    ]
    cards = []
    for key in sorted(shown, key=lambda key: key not in thresholds):
        if doubled and key == "image_to_text_exact":
            continue
        value, threshold = first[key], thresholds.get(key)
        state = verdict = tick = ""
        if threshold is not None:
            state, sign, color = ("met", "✓", "good") if value >= threshold else ("missed", "✗", "bad")
            verdict = f'<span class="mark {color}">{sign} threshold {_share(threshold)}</span>'
            tick = f'<i style="left:{min(100 * threshold, 99.6):.1f}%" title="threshold: {_share(threshold)}"></i>'
        more = [MEANINGS.get(key, ""), _sample_size(first, key)]
        more += [f"{escape(name)}: {_share(metrics[key])}" for name, metrics in others if key in metrics]
        cards.append(
            f'<div class="card score"><div class="name">{NAMES[key]}{verdict}</div>'
            f'<div class="value">{_share(value, small=True)}</div>'
            f'<div class="meter {state}"><b style="width:{100 * value:.1f}%"></b>{tick}</div>'
            f'<div class="more">{"<br>".join(filter(None, more))}</div></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _table(sets: Mapping[str, Mapping[str, Any]], thresholds: Mapping[str, float]) -> str:
    """Every number of every set. The numbers in NAMES are first, in the order of NAMES; the numbers of groups follow
    the number that they belong to.
    """
    keys = list(dict.fromkeys(k for metrics in sets.values() for k in metrics if isinstance(metrics[k], (int, float))))
    if not keys:
        return _notes(sets)
    order = {key: i for i, key in enumerate(dict.fromkeys([*NAMES, *keys]))}
    keys.sort(key=lambda key: (order.get(key.split("/")[0], order[key]), key))
    rows = []
    for key in keys:
        parent, _, group = key.partition("/")
        grouped = group and parent in keys
        name = f'<td class="sub">{escape(group)}</td>' if grouped else f"<td>{escape(NAMES.get(key, key))}</td>"
        cells = "".join(f"<td>{_cell(metrics, key)}</td>" for metrics in sets.values())
        rows.append(f"<tr>{name}<td>{_share(thresholds.get(key))}</td>{cells}</tr>")
    skipped = [
        f"{n} {reason.replace('_', ' ')} ({name})"
        for name, metrics in sets.items()
        for reason, n in (metrics.get("skipped") or {}).items()
    ]
    head = "".join(f"<th>{escape(name)}</th>" for name in sets)
    note = f'<p class="soft">Left out: {escape(", ".join(skipped))}.</p>' if skipped else ""
    note += _notes(sets)
    return (
        '<p class="lead">Shares with their 95 % Wilson interval and the number of questions.</p>'
        f'<div class="card scroll"><table><thead><tr><th>metric</th><th>threshold</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{note}"
    )


def _notes(sets: Mapping[str, Mapping[str, Json]]) -> str:
    """Notes for sets without the usual documents, which say what was asked instead."""
    notes = [f"{name}: {metrics['note']}." for name, metrics in sets.items() if metrics.get("note")]
    return "".join(f'<p class="soft">{escape(note)}</p>' for note in notes)


def _cell(metrics: Mapping[str, Any], key: str) -> str:
    value, n = metrics.get(key), (metrics.get("counts") or {}).get(key)
    if not isinstance(value, (int, float)):
        return ""
    if "psnr" in key:
        return f"{value:.2f} dB" + (f" <small>n={n}</small>" if n else "")
    if not n:
        return number(value)
    low, high = wilson(value, n)
    return f"{_share(value)} <small>{_share(low)[:-2]}–{_share(high)}, n={n}</small>"


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval (Wilson, 1927) of a share that was measured on n questions. It is also correct for shares of 0
    and 1."""
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def _share(value: float | None, small: bool = False) -> str:
    if value is None:
        return ""
    digits = f"{100 * value:.1f}".removesuffix(".0")
    return f"{digits}<small>%</small>" if small else f"{digits} %"


def _sample_size(metrics: Mapping[str, Any], key: str) -> str:
    n = (metrics.get("counts") or {}).get(key)
    if not n:
        return ""
    low, high = wilson(metrics[key], n)
    return f"n = {n}, 95 % interval {100 * low:.1f} to {100 * high:.1f}"


# ---- curves ------------------------------------------------------------------------------------------------

_ATTENTION = VALIDATION + ATTENTION
_PAIRS = {"text_to_image": "text at images", "image_to_text": "images at text"}

# Title, unit, {metric: name in the legend}, and the y axis that is shown first: "" (linear), "log" or "zero" (linear
# from 0).
Chart = tuple[str, str, Mapping[str, str], str]


def _tokenizer(
    galleries: Mapping[str, Sequence[Example]],
    rows: Sequence[Mapping[str, Any]],
    sets: Mapping[str, Mapping[str, Any]],
    scores: str,
) -> str:
    """The tokenizer's scores (or, if there are none, a few reconstructions next to their originals), and its curves."""
    first = next(iter(sets.values()))
    told = []
    if "tokenizer_psnr" in first:
        told.append(f"PSNR {first['tokenizer_psnr']:.1f} dB on held-out images")
    if "reconstruction_exact" in first:
        told.append(f"{_share(first['reconstruction_exact'])} of its reconstructions pass the checker")
    examples = [e for group in galleries.values() for e in group if e.reconstruction is not None]
    images = "".join(
        f'<div class="card sample"><div class="pair">{figure(example.expected, "real")}'
        f"{figure(example.reconstruction, 'reconstruction')}</div></div>"
        for example in examples[:8]
    )
    charts = _draw(rows, tokenizer_charts())
    lead = f'<p class="lead">{"; ".join(told)}.</p>' if told else ""
    gallery = scores or (f'<div class="gallery">{images}</div>' if images else "")
    between = "<h3>training</h3>" if charts and gallery else ""
    return lead + gallery + between + charts if gallery or charts else ""


def tokenizer_charts() -> tuple[Chart, ...]:
    """The curves of an image tokenizer's training."""
    return (
        ("Loss", "", _both("loss"), "log"),
        ("PSNR", "dB", _both("psnr"), ""),
        ("Codebook usage", "share of codes", _both("codes/usage"), ""),
        ("Code perplexity", "codes", _both("codes/perplexity"), ""),
        ("Learning rate", "", {"learning_rate": "learning rate"}, ""),
        ("Speed", "images/s", {"images_per_second": "images per second"}, "zero"),
    )


def transformer_charts(rows: Sequence[Mapping[str, Json]]) -> tuple[Chart, ...]:
    """The curves of a transformer's training, one for each role and task that the rows have metrics of."""
    keys = {key for row in rows for key in row}
    pairs = REWARDS + "margins" in keys
    return (
        ("Loss", "a pair" if pairs else "nats per token", _both("loss"), ""),
        *(_preference_charts(keys) if pairs else ()),
        ("Loss by role", "nats per token, train", _losses(keys, LOSS_BY_ROLE), ""),
        ("Loss by task", "nats per token, train", _losses(keys, LOSS_BY_TASK), ""),
        ("Image tokens", "bits per token", _both("bits_per_image_token"), ""),
        ("Text", "bits per byte", _both("bits_per_text_byte"), ""),
        ("Gradient norm", "before clipping", {"grad_norm": "norm"}, "log"),
        ("Learning rate", "", {"learning_rate": "learning rate"}, ""),
        ("log Z by role", "nats, train", _losses(keys, LOG_Z_BY_ROLE), ""),
        ("Speed", "tokens/s", {"tokens_per_second": "all"} | _losses(keys, TOKENS_PER_SECOND), "zero"),
        ("MFU", "share of the device's peak", {"mfu": "MFU"}, "zero"),
    )


def _preference_charts(keys: Collection[str]) -> tuple[Chart, ...]:
    """The curves of a training on preference pairs (training/preference.py)."""
    margins = REWARDS + "margins"
    whole = {margins: "margins"} | _losses(keys, margins + "/")
    return (
        ("Rewards", "train", {REWARDS + which: which for which in ("chosen", "rejected")}, ""),
        ("Margin of rewards", "train", whole, ""),
        ("Pairs ranked correctly", "share", _both(REWARDS + "accuracies"), ""),
        ("Log-probability of answers", "nats, train", {LOGPS + which: which for which in ("chosen", "rejected")}, ""),
        ("Loss of chosen answers", "nats per token", _both(LOSS_OF_CHOSEN), ""),
    )


def _transformer(rows: Sequence[Mapping[str, Json]]) -> str:
    """The curves of the training, with a remark if the validation loss has risen again."""
    words = turned(rows)
    said = f'<p class="lead">The {escape(words)}.</p>' if words else ""
    looks = _attention_charts(rows)
    return (
        said
        + _draw(rows, transformer_charts(rows))
        + (f"<h3>attention between text and images</h3>{looks}" if looks else "")
    )


def _both(key: str) -> dict[str, str]:
    return {key: "train", VALIDATION + key: "validation"}


def _losses(keys: Iterable[str], prefix: str) -> dict[str, str]:
    return {key: key.removeprefix(prefix).replace("_", " ") for key in sorted(keys) if key.startswith(prefix)}


def _draw(rows: Sequence[Mapping[str, Any]], charts: Iterable[Chart]) -> str:
    drawn = []
    for title, unit, metrics, axis in charts:
        series = {
            name: [(float(row["step"]), float(row[key])) for row in rows if isinstance(row.get(key), (int, float))]
            for key, name in metrics.items()
        }
        drawn.append(line_chart(title, series, unit=unit, log=axis == "log", zero=axis == "zero"))
    return f'<div class="grid2">{"".join(drawn)}</div>' if any(drawn) else ""


def _attention_charts(rows: Sequence[Mapping[str, Any]]) -> str:
    """The shares of attention between text and images (training/attention_share.py): by layer, and over time."""
    found = [row for row in rows if any(key.startswith(_ATTENTION) for key in row)]
    if not found:
        return ""
    latest: dict[str, list[tuple[float, float]]] = {}
    means: dict[str, list[tuple[float, float]]] = {}
    for row in found:
        for pair, name in _PAIRS.items():
            of_layers = {
                int(key.rpartition("_")[2]): value
                for key, value in row.items()
                if key.startswith(f"{_ATTENTION}{pair}/layer_") and isinstance(value, float)
            }
            if of_layers:
                means.setdefault(name, []).append((row["step"], sum(of_layers.values()) / len(of_layers)))
                latest[name] = sorted(of_layers.items())
                even = row[f"{_ATTENTION}{pair}/uniform"]
                latest[f"{name}, if attention were even"] = [(layer, even) for layer in sorted(of_layers)]
    steps = f"share of attention by layer (the first is 0), at step {found[-1]['step']}"
    drawn = line_chart("Text and images, by layer", latest, unit=steps, zero=True)
    drawn += line_chart("Text and images, over time", means, unit="share of attention, mean of layers", zero=True)
    return (
        '<p class="soft">How much attention the positions of one modality give to the other, on held-out '
        'documents; "even" is the share if all positions that they see had the same weight.</p>'
        f'<div class="grid2">{drawn}</div>'
    )


def _rows(source: str | Path | Sequence[Mapping[str, Json]]) -> list[Mapping[str, Json]]:
    if not isinstance(source, (str, Path)):
        return list(source)
    return list(read_metrics(source)) if Path(source).is_file() else []


# ---- the run -----------------------------------------------------------------------------------------------


def _run(config: Mapping[str, Json], seconds: Mapping[str, float]) -> str:
    total = sum(seconds.values())
    bands = legend = stages = ""
    for i, (name, s) in enumerate(seconds.items()):
        color = f"background:var(--c{i % 6})"
        bands += f'<b style="flex:{s / (total or 1):.4f};{color}" title="{escape(name)}"></b>'
        legend += f'<span class="key"><b style="{color}"></b>{escape(name)} <em>{_duration(s)}</em></span>'
    if seconds:
        stages = (
            f"<h3>{_duration(total)} from start to end</h3>"
            f'<div class="card"><div class="stages">{bands}</div>'
            f'<div class="legend">{legend}</div></div>'
        )
    whole = escape(json.dumps(config, indent=2, ensure_ascii=False, default=str))
    details = f"<details><summary>The whole config</summary><pre>{whole}</pre></details>" if config else ""
    return f'{stages}<h3>environment</h3><div class="card">{_list(environment())}</div>{details}'


def _facts(facts: Mapping[str, Json]) -> str:
    return f'<div class="card">{_list(facts)}</div>' if facts else ""


def _list(facts: Mapping[str, Json]) -> str:
    items = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items())
    return f'<dl class="facts">{items}</dl>'


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {rest:02} s"


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")
