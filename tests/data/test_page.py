"""The page that `validate` writes: it has the right content, and markup in the data has no effect."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ar_unified.data.checks import page, prepared
from ar_unified.data.checks.validate import validate
from ar_unified.data.filters import Filters, filtered
from ar_unified.data.images import to_png
from ar_unified.data.prepare import prepare
from ar_unified.data.sources import open_source
from ar_unified.language.grammar import Grammar
from ar_unified.manifests import ManifestMismatch
from tests.data.pictures import picture

HOSTILE = "</style></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp; @BODY@ @STYLE@"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Elements in order, and the text between them. Refuses tags that are not closed in order."""

    def __init__(self, path: Path):
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", list[str]()
        self.feed(self.html)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == "img"]

    def of_class(self, name: str) -> int:
        return sum(name in (attributes.get("class") or "").split() for _, attributes in self.elements)


def written(path: Path, validation: Any, title: str = "data") -> Page:
    page.write(path, validation, title)
    return Page(path)


def test_counts_lengths_bad_items_and_documents_are_on_it(folder: Path, kit: Any, tmp_path: Path) -> None:
    kit.spoil(folder)
    found = written(tmp_path / "page.html", validate(folder, show=1, show_progress=False), "my set")
    assert found.text.count("my set") == 2 and "31 items. 21 text to image, 10 bad" in found.text
    for kind in ("2 path_escapes", "1 unreadable_image", "1 bad_json", "Lengths in bytes of text"):
        assert kind in found.text
    assert found.images() and all((image["src"] or "").startswith("data:image/") for image in found.images())
    assert not found.of_class("tokens"), "there is no tokenizer"


def test_with_tokenizers_documents_are_tokens_with_decoded_images_beside_them(
    folder: Path, grammar: Grammar, tokenizer: Any, tmp_path: Path
) -> None:
    seen = validate(folder, grammar, tokenizer, sequence_length=128, show=1, show_progress=False)
    found = written(tmp_path / "page.html", seen)
    captions = found.html.split("<h3>Documents</h3>")[1].split("</section>")[0]
    assert re.search(r'<span class="text read" title="text, only read">p</span>', captions)
    assert re.search(r'<span class="control[^>]*>&lt;boi&gt;</span>', captions)
    assert "<figure><div><img" in captions and "4 x 4 codes</span> as it was encoded, and decoded" in captions
    assert captions.count("<img") == 3, "the image, and in the tokens as it was encoded and decoded"
    assert "30 tokens" in captions
    for said in ("Tokens by role", "Rows of 128 tokens: ", "Lengths in tokens"):
        assert said in found.text
    assert found.of_class("image") >= 2


def test_a_shown_image_is_encoded_once_and_alone(folder: Path, grammar: Grammar, tokenizer: Any, kit: Any) -> None:
    """A real tokenizer pads each call to a batch, unless it is asked for single images."""
    tokenizer.single = kit.Tokenizer()
    validate(folder, grammar, tokenizer, sequence_length=128, show=3, show_progress=False)
    assert tokenizer.single.shapes == [(1, 16, 16, 3)] * len(tokenizer.single.shapes) and not tokenizer.shapes
    assert len(tokenizer.single.shapes) == 3 + 3 + 2 * 3, (
        "three documents of each file, and two images in each of docs.jsonl"
    )


def test_nothing_of_the_data_becomes_a_part_of_the_page(tmp_path: Path, kit: Any) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.png").write_bytes(to_png(picture(1)))
    rows = [
        dict(image="1.png", text=HOSTILE),
        dict(image="1.png", text=HOSTILE),
        dict(image=f"{HOSTILE}.png", text="x"),
    ]
    kit.write(tmp_path / "a/captions.jsonl", rows)
    found = written(tmp_path / "page.html", validate(tmp_path / "a", show_progress=False), HOSTILE)
    assert not [tag for tag, _ in found.elements if tag == "script"]
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
    assert not [url for url in re.findall(r'(?:src|href)="([^"]*)"', found.html) if not url.startswith(("data:", "#"))]
    assert found.text.count(HOSTILE) == 4, "title, heading, two documents"
    assert "<script>alert(1)</script>" in found.text.split("Bad items")[1], "in what is wrong with the third"


def test_copies_and_what_is_held_out_too_are_side_by_side(tmp_path: Path, kit: Any) -> None:
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(to_png(picture(i)))
    (tmp_path / "cut.png").write_bytes(to_png(picture(1)[2:-1, 1:-1]))
    kit.write(tmp_path / "train.jsonl", [dict(image=f"{i}.png", text=f"a {i}") for i in (0, 1, "cut", 2)])
    kit.write(tmp_path / "test.jsonl", [dict(image="2.png", text="said otherwise"), dict(image="3.png", text="three")])
    sets = {name: [dict(kind="jsonl", path=tmp_path / f"{name}.jsonl")] for name in ("train", "test")}
    seen = validate(sets, show_progress=False)
    assert seen.alike is not None and [(kind.count, kind.of) for kind in seen.alike.kinds] == [
        (0, 6), (1, 6), (0, 4), (1, 4)
    ]  # fmt: skip
    told = "1 of 4 training documents share an image or their text with a held-out one"
    assert f"{told}; first pair: {tmp_path}/train.jsonl:4 and {tmp_path}/test.jsonl:1" in str(seen)
    found = written(tmp_path / "page.html", seen)
    assert told in found.text and found.of_class("pair") == 2
    assert "train: train" in found.text and "test: test" in found.text
    assert validate(sets, compare=False, show_progress=False).alike is None


def test_only_the_first_items_are_looked_at(folder: Path) -> None:
    seen = validate(folder, first=4, show_progress=False)
    assert [(found.items, found.looked) for found in seen.sources] == [(20, 4), (5, 4), (10, 4)]
    assert "the first 4 of 20 items, 4 good" in str(seen)


def test_a_prepared_folder_is_read_back(folder: Path, grammar: Grammar, tokenizer: Any, tmp_path: Path) -> None:
    sources = filtered(
        [open_source(dict(kind="folder", path=folder))], [], Filters(min_characters=10), "", show_progress=False
    )
    prepare(sources, grammar, tokenizer, tmp_path / "data/train", max_tokens=64, show_progress=False)
    folders = prepared.parts(tmp_path / "data")
    assert folders == {"train": tmp_path / "data/train"} == prepared.parts(tmp_path / "data/train")
    assert not prepared.parts(folder)
    seen = prepared.look(folders, grammar, tokenizer, show=11)
    (source,) = seen.sources
    assert source.kinds == {"filtered_length": 10} and sum(source.tasks.values()) == len(source.tokens)
    assert source.roles["image"] == 16 * sum(source.images)
    found = written(tmp_path / "page.html", seen)
    assert "10 filtered_length" in found.text and "Rows of 64 tokens: " in found.text
    assert "decoded from its codes" in found.text and "picture 10" in found.text
    bare = written(tmp_path / "bare.html", prepared.look(folders, show=1, first=3))
    assert "decoded" not in bare.text and bare.of_class("tokens") == 1, "without tokenizers: numbers, by their roles"
    other = kit_of_other_size(grammar)
    with pytest.raises(ManifestMismatch):
        prepared.look(folders, other, tokenizer)


def kit_of_other_size(grammar: Grammar) -> Grammar:
    from ar_unified.language.syntax import fixed_grid

    return Grammar(grammar.vocabulary, fixed_grid(2, 2), grammar.text_codec)
