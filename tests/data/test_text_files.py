"""Plain text as documents, and how much of it trains a text tokenizer."""

from __future__ import annotations

import json
import math
import random
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ar_unified.data.balance import indices, passes, text_bytes
from ar_unified.data.checks.validate import validate
from ar_unified.data.items import has_images, language
from ar_unified.data.loader import ImageBatches, NothingReadable
from ar_unified.data.prepare import prepare
from ar_unified.data.sources import BadItem, open_source, read, text_files, texts
from ar_unified.language.document import Document, TextPart
from ar_unified.language.grammar import Grammar
from ar_unified.language.syntax import fixed_grid
from ar_unified.language.vocabulary import Vocabulary


def source(path: Path, **options: Any) -> Any:
    return open_source(dict(kind="text", path=path, **options))


@pytest.fixture
def corpus(tmp_path: Path, kit: Any) -> Path:
    root = tmp_path / "corpus"
    (root / "deep").mkdir(parents=True)
    (root / "deep" / "b.txt").write_text("one\r\n\n \n  two\u2028half \nthree", newline="")
    (root / "a.md").write_text("# A\n\ntext\n")
    (root / "c.jsonl").write_bytes(b'{"text": "row \\n 1", "language": "nl", "id": 7}\n\n{"text": "row 2"}\n')
    (root / ".hidden.txt").write_text("not this")
    (root / "image.png").write_bytes(b"\xff\xd8")
    return root


def test_documents_are_files_or_lines_and_rows(corpus: Path) -> None:
    whole, lines = source(corpus), source(corpus, by="line")
    assert list(texts([whole])) == ["# A\n\ntext\n", "row \n 1", "row 2", "one\r\n\n \n  two\u2028half \nthree"]
    assert list(texts([lines])) == ["# A", "text", "row \n 1", "row 2", "one", "  two\u2028half ", "three"]
    assert lines[5] == Document.of((TextPart("  two\u2028half "),)) and lines[5].task == "text"
    found = [lines.origin(i).removeprefix(f"{corpus}/") for i in (1, 3, 5)]
    assert found == ["a.md:3", "c.jsonl:3", "deep/b.txt:4"] and whole.origin(3) == f"{corpus}/deep/b.txt"
    assert lines[2].id == "7" and lines[2].meta == {"language": "nl"}
    assert [language(lines, i) for i in (2, 3, 5)] == ["nl", "", ""]
    assert language(source(corpus, by="line", language="file"), 5) == "b"
    assert whole.name == "corpus" and source(corpus / "a.md").name == "a"
    assert list(texts([source(corpus, files=("*.md",))])) == ["# A\n\ntext\n"]


def test_the_fingerprint_follows_the_text(corpus: Path) -> None:
    before = dict(source(corpus).fingerprint)
    assert before == source(corpus).fingerprint != source(corpus, by="line").fingerprint
    (corpus / "a.md").write_text("# B\n\ntext\n")
    assert source(corpus).fingerprint != before


@pytest.mark.parametrize("block", [10, 16, 1 << 14])
def test_bad_texts_are_named_by_file_place_and_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(text_files, "_LARGEST", 100)
    monkeypatch.setattr(text_files, "_BLOCK", block)
    root = tmp_path / "set"
    root.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (root / "link.txt").symlink_to(tmp_path / "secret.txt")
    (root / "loop.txt").symlink_to(root / "loop.txt")
    (root / "lines.txt").write_bytes(b"fine\ncaf\xe9\n" + b"x" * 350 + b"\nlast\n")
    (root / "long.txt").write_bytes(b"y" * 200)
    (root / "rows.jsonl").write_bytes(b'{"text": "cut\n{"body": "x"}\n[1]\n{"text": " "}\n{"text": "\\ud800"}\n')
    found = {item.origin.split("/")[-1]: item for _, item in read(source(root, by="line"), range(12))}
    bad = {place: item.kind for place, item in found.items() if isinstance(item, BadItem)}
    assert bad == {
        "lines.txt:2": "bad_utf8",
        "lines.txt:3": "too_large",
        "long.txt:1": "too_large",
        "link.txt": "path_escapes",
        "loop.txt": "unreadable_file",
        "rows.jsonl:1": "bad_json",
        "rows.jsonl:2": "bad_row",
        "rows.jsonl:3": "bad_row",
        "rows.jsonl:4": "empty_text",
        "rows.jsonl:5": "bad_text",
    }
    assert "0xe9 at byte 8 of the file" in str(found["lines.txt:2"])
    assert "a text under the key 'text', found the keys body" in str(found["rows.jsonl:2"])
    assert found["lines.txt:4"].parts == (TextPart("last"),)
    kinds: Counter[str] = Counter()
    assert list(texts([source(root, by="line")], left_out=lambda bad: kinds.update([bad.kind]))) == ["fine", "last"]
    assert kinds == Counter(bad.values())
    with pytest.raises(BadItem, match="too_large: .* by='line' makes every line a document"):
        source(root, files=("lines.txt",))[0]


def test_wrong_arguments_say_what_is_expected(corpus: Path) -> None:
    for options, message in [
        (dict(path=corpus / "nowhere"), "nowhere: no such file or folder"),
        (dict(path=corpus, files=("*.rst",)), "expected files named .*rst in it, found none"),
        (dict(path=corpus, files=("../*.txt",)), "expected patterns of names inside"),
        (dict(path=corpus, by="page"), "by: expected file or line, found 'page'"),
        (dict(path=corpus, split="dev"), "no text is in split 'dev'"),
    ]:
        with pytest.raises(ValueError, match=message):
            source(**options)


@pytest.mark.parametrize("by", ["line", "file"])
def test_the_parts_of_a_split_make_the_whole(tmp_path: Path, by: str) -> None:
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text("".join(f"{i} {j}\n\n" for j in range(10)))
    first, last = (list(texts([source(tmp_path, by=by, split=split)])) for split in ("[:70%]", "train[70%:]"))
    assert sorted(first + last) == sorted(texts([source(tmp_path, by=by)]))
    assert 0.4 < len(first) / len(first + last) < 0.95


def test_a_corpus_is_read_at_any_place_and_never_held(tmp_path: Path) -> None:
    """The text has 3 MB in lines of about 100 bytes. The index has 40 bytes per 16 KiB of text."""
    draw = random.Random(0)
    lines = [f"{i:07d} {'x' * draw.randrange(180)}" for i in range(30_000)]
    (tmp_path / "corpus.txt").write_text("\n".join(lines) + "\n")
    tracemalloc.start()
    try:
        big = source(tmp_path, by="line")
        kept = tracemalloc.get_traced_memory()[0]
        drawn = list(texts([big], [1 / 300]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(big) == 30_000 and kept < 60_000 and peak < 600_000
    for i in (0, 29_999, 21_234, 7):
        assert big.texts(i) == [lines[i]] and big.origin(i).endswith(f":{i + 1}")
    numbers = [int(line[:7]) for line in drawn]
    assert len(set(numbers)) == 100 and all(n // 300 == i for i, n in enumerate(numbers))
    assert text_bytes(big) == pytest.approx(sum(map(len, lines)), rel=0.15)


@pytest.mark.parametrize(("times", "counts"), [(1.0, {1}), (2.5, {2, 3}), (0.0, {0}), (0.3, {0, 1})])
def test_places_come_as_often_as_asked(times: float, counts: set[int]) -> None:
    found = Counter(indices(10_000, times, "a"))
    assert found.total() == round(times * 10_000) and {found[i] for i in range(10_000)} == counts
    assert list(indices(10_000, times, "a")) == list(indices(10_000, times, "a"))


def test_a_temperature_shows_more_of_small_languages(tmp_path: Path) -> None:
    for name, count in (("large", 900), ("small", 9)):
        (tmp_path / f"{name}.txt").write_text("a line of text\n" * count)
    sources = [source(tmp_path / f"{name}.txt", by="line") for name in ("large", "small")]
    assert passes(sources) == [1, 1]
    assert passes(sources, temperature=2) == [1, pytest.approx(10)]
    assert passes(sources, temperature=math.inf) == [1, pytest.approx(100)]
    assert passes(sources, max_bytes=14 * 303) == pytest.approx([1 / 3, 1 / 3])
    assert len(list(texts(sources, passes(sources, temperature=2, max_bytes=14 * 99)))) == pytest.approx(99, abs=1)
    with pytest.raises(ValueError, match="temperature: expected at least 1, found 0.5"):
        passes(sources, temperature=0.5)


class Upper:
    """A text tokenizer that changes all letters to upper case."""

    size, hash = 256, "upper"

    def encode(self, text: str) -> list[int]:
        return list(text.upper().encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode()


def test_text_alone_becomes_tokens_and_what_a_tokenizer_loses_is_left_out(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("UPPER\nLower\n" + "LONG\n\n" * 10)
    vocabulary = Vocabulary(256, 16, text_hash="upper", image_hash=tokenizer.hash)
    grammar = Grammar(vocabulary, fixed_grid(4, 4), Upper())
    for by, documents, skipped in (("line", 11, {"text_lost": 1}), ("file", 0, {"text_lost": 1})):
        folder = tmp_path / by
        report = prepare(
            [source(tmp_path / "a.txt", by=by)],
            grammar,
            tokenizer,
            folder,
            max_tokens=32,
            may_be_lost=True,
            show_progress=False,
        )
        assert report.sources["a"].documents == documents and report.sources["a"].skipped == skipped
    assert "a.txt:2" in (tmp_path / "line" / "skipped.jsonl").read_text()
    found = validate(tmp_path / "a.txt", grammar, tokenizer, show_progress=False)
    assert [bad.kind for bad in found.bad] == ["text_lost"]


def test_an_image_tokenizer_is_trained_on_sources_with_images_only(corpus: Path, folder: Path) -> None:
    images = open_source(dict(kind="folder", path=folder))
    batches = ImageBatches([source(corpus), images], size=(16, 16), batch_size=4, weights=[5.0, 1.0])
    assert batches.sources == [images] and batches.batch(0)["pixels"].shape == (4, 16, 16, 3)
    with pytest.raises(ValueError, match="expected a source with images; found sources of text alone: corpus"):
        ImageBatches([source(corpus)], size=(16, 16), batch_size=4)
    batches.check()
    (folder / "docs.jsonl").write_text(json.dumps(dict(segments=[dict(type="text", text="words")])) + "\n{\n" * 2)
    wordy = open_source(dict(kind="folder", path=folder, files=("docs",), label="wordy"))
    for ask in (ImageBatches([images, wordy], size=(16, 16), batch_size=4).check,
                lambda: ImageBatches([wordy], size=(16, 16), batch_size=4).batch(0)):  # fmt: skip
        with pytest.raises(NothingReadable, match="'wordy': no readable image in its 3 documents: 1 no_image, first"):
            ask()


def test_validate_reads_a_folder_of_text(corpus: Path) -> None:
    (found,) = validate(corpus, show_progress=False).sources
    assert found.tasks == {"text": 4} and not found.bad


def test_text_of_a_tfds_dataset_knows_its_language(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tensorflow_datasets as tfds

    class Sentences(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(dict(text=tfds.features.Text(), language=tfds.features.Text())),
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield 0, dict(text="een cirkel", language="nld")
            yield 1, dict(text="a circle", language="eng")

    found = open_source(dict(kind="tfds", name="sentences", data_dir=str(tmp_path)))
    assert {language(found, i): found.texts(i) for i in range(2)} == {"nld": ["een cirkel"], "eng": ["a circle"]}
    assert found[0].task == "text" and not has_images(found)
    said = capsys.readouterr().out
    assert "sentences/1.0.0: TFDS prepares this dataset in" in said
    assert "TFDS downloads what" in said and "Unknown" not in said
