"""Each thing that can be added is named where a reader looks for it; docs/extending.md tells where."""

from __future__ import annotations

import ast
import re

import pytest
from ar_tokenizers.image import quantizers

from ar_unified.cli.main import VERBS
from ar_unified.data.sources import open_source
from ar_unified.errors import UserError
from ar_unified.evaluation.right_answers import PROTOCOLS
from ar_unified.interop import IMAGE_SYSTEMS, SYSTEMS
from tests.test_docs import PAGES, ROOT, UNVISITED


def stems(pattern: str) -> list[str]:
    return [path.stem for path in ROOT.glob(pattern) if not path.stem.startswith("_")]


def kinds_of_data() -> list[str]:
    with pytest.raises(UserError) as refused:
        open_source(dict(kind="none"))
    return re.findall(r"'(\w+)'", str(refused.value).partition("; found")[0])


# What can be added -> the files that name each one, so that a reader finds it; docs/extending.md tells this.
LISTS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "a quantizer": (
        [*quantizers.NAMES],
        (
            "README.md",
            "docs/image_tokenizers.md",
            "tokenizers/ar_tokenizers/image/quantizers/__init__.py",
        ),
    ),
    "a recipe of an image tokenizer": (stems("experiments/image_tokenizers/*.py"), ("docs/image_tokenizers.md",)),
    "a kernel": (stems("ar_unified/kernels/*"), ("ar_unified/kernels/__init__.py",)),
    "a kind of data": (kinds_of_data(), ("docs/data.md",)),
    "a protocol": ([*PROTOCOLS], ("docs/evaluation.md",)),
    "a published system": ([*SYSTEMS, *IMAGE_SYSTEMS], ("docs/published_weights.md",)),
    "a verb": ([*VERBS], ("docs/workdirs.md",)),
}


@pytest.mark.parametrize("kind", LISTS)
def test_what_can_be_added_is_named_where_it_is_looked_for(kind):
    named, places = LISTS[kind]
    told = {place: (ROOT / place).read_text(encoding="utf-8") for place in places}
    if kind == "a quantizer":  # other words of the module are no list
        told[places[2]] = ast.get_docstring(ast.parse(told[places[2]])) or ""
    missing = [
        f"{place}: {name}"
        for place in places
        for name in named
        if not re.search(rf"(?<![\w]){re.escape(name)}(?![\w])", told[place], re.IGNORECASE)
    ]
    assert named and not missing


@pytest.mark.parametrize("file", ["tests/tokenizers/test_quantizers.py", "experiments/benchmarks/quantizers.py"])
def test_an_added_quantizer_is_tested_and_compared(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert not [name for name in quantizers.NAMES if f'quantizer="{name}"' not in text]


def test_every_experiment_is_on_a_page():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES if page.name not in UNVISITED)
    scripts = [*stems("experiments/*.py"), *stems("experiments/benchmarks/*.py"), *stems("experiments/published/*.py")]
    assert len(scripts) > 25 and not [name for name in scripts if name not in text]
