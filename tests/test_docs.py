"""README and the pages of docs/ are right: commands parse, keys and files exist, snippets run, and every error is
explained."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ml_collections import ConfigDict
from PIL import Image

from ar_unified import bundle
from ar_unified.cli.arguments import parser_of
from ar_unified.cli.main import VERBS
from ar_unified.data.sources import kind_of
from ar_unified.experiment import settings
from ar_unified.experiment.config import defaults, load, pick
from ar_unified.language.document import Document, ImagePart
from ar_unified.language.rows import document_from_json
from ar_unified.model.lora import LoraConfig
from ar_unified.training.optimizer import OptimizerConfig, learning_rate
from ar_unified.training.rates import read_rate
from tests import adapters, bundles, published_bundles
from tests.sources import files, tree

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^(<!-- runs -->\n)?```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Placeholders for the reader's own files -> their replacements here, files of `places`.
STANDS_FOR = {"FILE": "experiments/shapes.py", "DIR": "mine", "DIR2": "mine", "PATH": "mine", "BUNDLE": "bundle"}
ARGUMENT = re.compile(r"(?<=[=,:])(DIR2|DIR|PATH|BUNDLE|LLM|FILE|chameleon|emu3|apart)(?=,|$)")


def snippets(language: str, run: bool | None = None) -> list[Any]:
    """(page:line, text) of every fenced block of a language."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            if match[2] == language and (run is None or run == bool(match[1])):
                where = f"{page.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}"
                found.append(pytest.param(match[3], id=where))
    return found


BEFORE = re.compile(r"^(?:[A-Z_]+=\S+ |nice -n \S+ |taskset -c \S+ )+(?=python |ar-unified )")


def lines(text: str) -> Iterator[list[str]]:
    """The words of each command of a block, without the variables and priorities before it. A line that ends in a
    backslash continues.
    """
    for line in text.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(BEFORE.sub("", line), comments=True)
        except ValueError:  # no command
            continue
        for part in " ".join(map(shlex.quote, words)).split(" '&&' "):
            yield shlex.split(part)


PROGRAMS = ("ar-unified", "python", "make", "docker", "pip", "source", "echo")
CODE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
UNVISITED = ("CHANGELOG.md", "docs/tests_time.md", "docs/mutations.md")  # they tell what was, not what to do


def commands() -> Iterator[tuple[str, str, list[str]]]:
    """(page, line, words) of every command of the pages in order: of their blocks, and whole ones within sentences."""
    for path in PAGES:
        page, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        found = [(at.start(), at[3]) for at in FENCE.finditer(text) if at[2] in ("", "sh")]
        if page not in UNVISITED:
            sentences = FENCE.sub(lambda at: re.sub(r"[^\n]", " ", at[0]), text)  # at the same places
            found += [(at.start(), at[1].replace("\n", " ")) for at in CODE.finditer(sentences) if whole(at[1])]
        for place, code in sorted(found):
            where = f"{page}:{text[:place].count(chr(10)) + 1}"
            yield from ((page, where, words) for words in lines(code) if words and words[0] in PROGRAMS)


def whole(code: str) -> bool:
    """Whether code within a sentence is a command that a reader can give. Others are names of verbs, or options."""
    words = next(lines(code.replace("\n", " ")), [])
    if len(words) < 2 or "..." in words:
        return False
    if words[0] == "ar-unified":
        return words[1] in ("demo", "--version") or bool({"--config", "--from", "validate"} & {*words[:-1]})
    return words[0] != "make" or bool([word for word in words[1:] if "=" not in word and word[0] != "-"])


COMMANDS = [
    pytest.param(words, id=f"{where} {' '.join(words)[:90]}")
    for _, where, words in commands()
    if words[0] in ("ar-unified", "python", "make")
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the pages name: experiments, a user's own folder, a bundle."""
    here = tmp_path_factory.mktemp("reader")
    for name in ("experiments", "examples"):
        (here / name).symlink_to(ROOT / name)
    (here / "mine").mkdir()
    for i in range(2):
        Image.new("RGB", (16, 16), (200 * i, 0, 0)).save(here / "mine" / f"{i}.png")
    rows = [{"image": f"{i}.png", "text": "A square."} for i in range(2)]
    (here / "mine" / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (here / "mine" / "en.txt").write_text("A square.\n")
    (here / "prompts.jsonl").write_text('{"prompt": "A square."}\n')
    written = bundles.write(here / "bundle")
    for name in ("sketch", "photo"):
        adapters.write(here / "adapters" / name, written, LoraConfig(rank=2, alpha=4.0))
    shutil.copytree(here / "bundle" / "image_tokenizer", here / "llamagen")
    return here


def test_the_pages_have_commands_and_snippets():
    calls: list[Any] = [words.values[0] for words in COMMANDS]
    assert len(calls) > 60 and {call[0] for call in calls} == {"ar-unified", "python", "make"}
    said = {call[1] for call in calls if call[0] == "ar-unified"}
    assert said - {"VERB", "--version"} == VERBS.keys()


def test_every_command_stands_where_it_is_looked_for():
    """In a fenced block or in backticks: not in an indented block."""
    lost = [
        f"{page.name}: {line}"
        for page in PAGES
        for line in FENCE.sub("", page.read_text(encoding="utf-8")).splitlines()
        if re.match(rf"\s{{4,}}(?:{'|'.join(PROGRAMS)}) ", line)
    ]
    assert not lost


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_of_the_pages_can_be_given(words, places, monkeypatch, capsys):
    """Commands parse with the real parser, their keys are in the real config, and scripts and targets exist."""
    monkeypatch.chdir(places)
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [word for word in rest if "=" not in word and word not in targets] == []
    elif program == "python":
        if rest[0].endswith(".py"):
            assert (ROOT / rest[0]).is_file()
        else:
            assert rest[0] in ("-c", "-m"), rest
    elif rest[0] not in ("--version", "VERB"):
        named = [
            STANDS_FOR.get(word, word) if before == "--config" else word
            for before, word in zip(words, rest, strict=False)
        ]
        arguments, overrides = parser_of(rest[0]).parse_known_args(named[1:])
        assert not [word for word in overrides if not (word.startswith("--config.") and "=" in word)]
        check_config(getattr(arguments, "config", None), overrides)


def check_config(file: str | None, overrides: list[str]) -> None:
    """Loads the config of a command with its keys, if it is a config that loads without the reader's data."""
    keys = [override.replace("=FILE", "=").replace("=FOLDER", "=") for override in overrides]
    keys = [key.replace("=N", "=1") for key in keys if "fsq|vq" not in key]
    file = file or "experiments/shapes.py"
    file = ARGUMENT.sub(lambda match: STANDS_FOR.get(match[1], "bundle"), file)
    file = file.replace("s3://bucket/set", "mine").replace("lpips=mine,", "").replace(",lpips=mine", "")
    file = file.replace("experiments/shapes.py:", "shapes:")
    if file in ("$C",):
        return
    training = load(file, keys).training
    learning_rate(pick(OptimizerConfig, training), training.steps)  # raises if the warm-up is too long for the steps


@pytest.mark.parametrize("text", snippets("jsonl"))
def test_rows_of_the_pages_are_rows(text):
    for line in text.splitlines():
        row = json.loads(line)
        if ("chosen" in row or not {"prompt", "mode", "id"} & row.keys()) and row.get("messages", [{}, {}])[1:]:
            document_from_json(row, lambda name: np.zeros((16, 16, 3), np.uint8))


@pytest.mark.parametrize("text", snippets("python"))
def test_python_of_the_pages_compiles(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ar_unified"):
            module = __import__(node.module or "", fromlist=["x"])
            assert not [name.name for name in node.names if not hasattr(module, name.name)]


def test_specs_of_sources_in_the_pages_are_of_kinds_that_there_are():
    found = 0
    for page in PAGES:
        for spec in re.findall(r"dict\(kind=[^\n`]*?\)(?=\)|`|,?$|  )", page.read_text(encoding="utf-8"), re.MULTILINE):
            if "..." not in spec:
                kind_of(eval(spec, {"DIR": "mine", "path": "mine", "dict": dict}))  # noqa: S307
                found += 1
    assert found >= 8


@pytest.mark.slow
@pytest.mark.parametrize("text", snippets("python", run=True))
def test_python_of_the_pages_runs(text, places):
    """The unchanged snippets after `<!-- runs -->`, run beside a bundle of untrained networks."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tokenizers'}", "JAX_NUM_CPU_DEVICES": "1"}
    more = "\nprint(type(get_config()).__name__)" if "def get_config" in text else ""
    done = subprocess.run(
        [sys.executable, "-c", text + more], cwd=places, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# Pages with parts of programs -> the names that such a part takes from around it.
AROUND: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/data_at_scale.md": lambda: dict(config=defaults(), ConfigDict=ConfigDict),
    "docs/from_llm.md": lambda: dict(config=defaults()),
    "docs/kernels.md": lambda: (
        dict.fromkeys("qkv", np.ones((1, 16, 2, 16), np.float32)) | dict(doc_start=np.zeros((1, 16), np.int32))
    ),
    "docs/published_weights.md": lambda: dict(image=bundles.grey(), tokens=np.arange(8)[None]),
    "docs/rewards.md": dict,
}


@pytest.mark.slow
@pytest.mark.parametrize("block", [pytest.param(each, id=each.id) for each in snippets("python", run=False)])
def test_parts_of_programs_run_with_what_is_around_them(block, tmp_path, monkeypatch):
    """Every block of Python without `<!-- runs -->`; a tiny model stands for Chameleon, with its own number of ids."""
    page, text = str(block.id).partition(":")[0], block.values[0]
    monkeypatch.chdir(tmp_path)
    if '"chameleon"' in text:
        model = bundle.write(tmp_path / "chameleon", **published_bundles.parts("chameleon"))
        assert "range(65536)" in text
        text = text.replace("range(65536)", f"range({model.grammar.vocabulary.used})")
    names = AROUND[page]()
    exec(text, names)
    if "warm" in names:
        red = Document.of((ImagePart(np.full((2, 2, 3), (9, 0, 0), np.uint8)),))
        assert names["warm"](None, red) == 9
    if "config" in names:
        training = names["config"].training
        assert len(settings.phases(training, {})) == 1 + len(training.phases) and settings.shapes(training)
        assert [read_rate(rate)[1] for rate in training.rates] in ([], [0.1, 0.3, 2])


def test_links_of_the_pages_lead_somewhere():
    """`make docs` checks links of the site; this checks the files as people read them in the repository."""
    broken = []
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for target, anchor in re.findall(r"\]\(([^)#\s:]*)(#[^)\s]+)?\)", text):
            path = (page.parent / target).resolve() if target else page
            if not path.exists():
                broken.append(f"{page.name}: {target}")
            elif anchor and path.suffix == ".md" and anchor[1:] not in anchors(path):
                broken.append(f"{page.name}: {target}{anchor}")
    assert not broken


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", head.lower()).strip()) for head in heads}


def test_keys_that_the_pages_name_are_keys():
    """Keys like `training.steps` and `config.data.filters`: in backticks, with a section that a config has."""
    known = names(defaults())
    sections = "|".join(key for key, value in defaults().items() if isinstance(value, ConfigDict))
    wrong = []
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for key in re.findall(rf"`(?:--)?(?:config\.)?((?:{sections})(?:\.\w+)+)(?=[`=])", text):
            elsewhere = key.endswith((".py", ".json")) or key in ("model.ids", "model.score")  # files, and a Model
            if key not in known and not elsewhere:
                wrong.append(f"{page.name}: {key}")
    assert not wrong


def names(config: ConfigDict, prefix: str = "") -> set[str]:
    found = set()
    for key, value in config.items():
        found |= {prefix + key} | (names(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else set())
    return found


def test_every_kind_of_error_has_its_cure():
    """Every subclass of UserError and RunError, and every kind of left-out item, is named on a page."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    kinds = {"UserError", "RunError"}
    grown = kinds
    classes = [
        (node.name, {ast.unparse(base).rpartition(".")[2] for base in node.bases})
        for path in files("ar_unified", "tokenizers")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef)
    ]
    while grown:
        grown = {name for name, bases in classes if bases & kinds} - kinds
        kinds |= grown
    assert len(kinds) > 15 and not [kind for kind in sorted(kinds) if f"`{kind}`" not in text]


def test_every_kind_of_bad_item_is_explained():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    kinds = set()
    for path in files("ar_unified/data", "ar_unified/language"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("BadItem", "DocumentError"):
                if node.args and isinstance(node.args[0], ast.Constant):
                    kinds.add(str(node.args[0].value))
    assert len(kinds) > 8 and not sorted(kind for kind in kinds if f"`{kind}`" not in text)


def test_words_of_messages_that_the_pages_quote_are_said():
    """Every quoted message of the troubleshooting page, like **"not finite at step"**, is in the code."""
    quoted = re.findall(r'\*\*"([^"]+)"\*\*', (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))
    source = "".join(path.read_text(encoding="utf-8") for path in files("ar_unified", "tokenizers"))
    told = re.sub(r"\"\s*\n\s*f?\"", "", source) + "no such file No space left on device Unable to initialize backend"
    parts = [part.strip(" ;,") for each in quoted for part in each.split("...")]
    assert len(quoted) > 15 and not [part for part in parts if part and part not in told]


def test_ci_calls_what_ci_is():
    found = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = found["jobs"]["ci"]["steps"]
    assert ".ci/run" in [step.get("run") for step in steps] and os.access(ROOT / ".ci/run", os.X_OK)
    (python,) = [step for step in steps if "setup-python" in step.get("uses", "")]
    assert python["with"]["python-version"].split() == ["3.12", "3.11"], "the last is python3"


def test_hooks_run_what_lint_runs():
    """Each tool of `make lint` has a hook with the same tool, and no hook is downloaded."""
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"
    hooks = {
        hook["entry"].split()[0].rpartition("/")[2] + " " + hook["entry"].split()[1]
        for hook in repo["hooks"]
        if len(hook["entry"].split()) > 1
    }
    alone = {hook["entry"].rpartition("/")[2] for hook in repo["hooks"] if len(hook["entry"].split()) == 1}
    lint = (ROOT / "Makefile").read_text().partition("\nlint: setup\n")[2].partition("\n\n")[0]
    tools = set(re.findall(r"\$\(BIN\)/(ruff \w+|\w+)", lint))
    assert hooks | alone == tools


def test_citation_has_what_cff_asks_for():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= found.keys() and found["license"] == "Apache-2.0"
