"""A model's card in Markdown, for people: what the model is, its training data, its results, and how to open it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ar_tokenizers.image.config import AutoencoderConfig

from ar_unified.evaluation.facts import summary
from ar_unified.evaluation.report import NAMES
from ar_unified.language.vocabulary import Vocabulary
from ar_unified.manifests import Json
from ar_unified.model.config import TransformerConfig, parameter_count

_VALIDATION = ("loss", "bits_per_text_byte", "bits_per_image_token")
_TOKENIZER = ("psnr", "ssim", "usage", "bits_per_pixel")
_OPEN = """```python
import ar_unified

model = ar_unified.load({name})  # the path of this folder
{calls}
```
"""
_DRAWS = """images = model.draw("A red circle.", seed=3, n=4)  # four Pillow images
answer = model.ask(images[0], "What is in the image?")  # a text"""
_WRITES = 'answer = model.ask("What is a circle?")  # a text'


def card(
    *,
    name: str,
    draws: bool,
    license: str,
    model: TransformerConfig,
    vocabulary: Vocabulary,
    image: AutoencoderConfig | None,
    config: Mapping[str, Json],
    training: Mapping[str, Json],
    evaluation: Mapping[str, Any] | None,
) -> str:
    """The README.md of a bundle.

    Args:
        name: the name of the bundle's folder.
        draws: whether the model can draw images.
        license: the licence; if it is "", the card says that it is unknown.
        image: the shape of the image tokenizer; None for text alone.
        config: the config of the experiment as JSON values.
        training: facts about the training, by name.
        evaluation: what `ar-unified evaluate` wrote; None if it has not scored these weights.
    """
    codes = f", {vocabulary.codebook_size:,} image codes" if image else ", no images"
    facts = {
        "parameters": f"{parameter_count(model):,} ({model.n_layers} layers of {model.d_model})",
        "vocabulary": f"{vocabulary.used:,} ids: {vocabulary.text_size:,} text pieces{codes}",
        **({"image tokenizer": f"{image.backbone}, {image.quantizer}, {image.factor} pixels a code"} if image else {}),
        **{name: words for name, words in summary(config).items() if name != "text" and (image or name != "images")},
        **training,
        "license": license
        or "unknown. Before you share this model, write its licence here and in the first lines of this file",
    }
    rows = dict(_numbers(evaluation or {}))
    counts = (evaluation or {}).get("counts", {})
    lines = [
        "---",
        f"license: {_yaml(license or 'unknown')}",
        "library_name: ar_unified",
        "---",
        "",
        f"# {name}",
        "",
        f"An autoregressive transformer of {parameter_count(model) / 1e6:.2f}M parameters that reads and writes "
        f"{'text and images' if image else 'text'} as discrete tokens. It was trained by ar_unified, with the "
        f"experiment `{config['name']}`.",
        "",
    ]
    lines += _table(("", ""), [(name, str(value)) for name, value in facts.items()])
    lines += [
        "",
        "## Open it",
        "",
        _OPEN.format(name=json.dumps(name, ensure_ascii=False), calls=_DRAWS if draws else _WRITES),
    ]
    lines += ["## Results", ""]
    if rows:
        shown = [(NAMES.get(name, name), f"{value:.4g}", str(counts.get(name, ""))) for name, value in rows.items()]
        lines += ["Measured on held-out documents by `ar-unified evaluate`.", "", *_table(("", "", "asked"), shown)]
    else:
        lines += ["Nothing was measured on these weights."]
    return "\n".join(lines) + "\n"


def _numbers(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, value) of the numbers that a card shows: shares of right answers in each held-out set, losses, and scores
    of the image tokenizer.
    """
    for name, value in evaluation.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value
        elif name == "validation":
            yield from ((f"validation {key}", value[key]) for key in _VALIDATION if key in value)
        elif name == "tokenizer":
            for split, scores in value.items():
                yield from ((f"tokenizer {split} {key}", scores[key]) for key in _TOKENIZER if key in scores)
        elif name != "counts" and isinstance(value, Mapping):
            yield from (
                (f"{name}: {NAMES.get(key, key)}", each) for key, each in value.items() if isinstance(each, float)
            )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    cells = [head, tuple("---" for _ in head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in cells]


def _yaml(words: str) -> str:
    """Quotes any text for YAML."""
    plain = words.replace("-", "").replace(".", "").isalnum()
    return words if plain else '"' + words.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'
