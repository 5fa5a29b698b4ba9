from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ar_unified import workdir
from ar_unified.data.images import Resize, to_png
from ar_unified.data.prepare import NothingLeft, load_manifest, load_report, prepare
from ar_unified.data.prepare.cutting import characters, split
from ar_unified.data.prepare.encoder import Tokenizers
from ar_unified.data.prepare.image_codes import ImageCodes, digest_of
from ar_unified.data.shards import Shards, read_skipped
from ar_unified.data.sources import Source, open_source
from ar_unified.language.document import CodesPart, Document, ImagePart, TextPart
from ar_unified.language.grammar import Grammar
from ar_unified.language.syntax import fixed_grid, sized_rows
from ar_unified.manifests import ManifestMismatch


def opened(folder: Path, **options: Any) -> Source:
    return open_source(dict(kind="folder", path=folder, **options))


def run(sources: list[Source], grammar: Grammar, tokenizer: Any, out: Path, **options: Any) -> Any:
    settings = dict(max_tokens=512, batch_size=8, shard_items=7, show_progress=False)
    return prepare(sources, grammar, tokenizer, out, **(settings | options))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def documents(out: Path, source: str, grammar: Grammar) -> list[Document]:
    count = load_manifest(out)["report"][source]["shards"]
    shards = Shards(out / source, count)
    return [grammar.parse(found.tokens) for found in shards.read(range(len(shards)))]


def test_what_is_on_disk_is_what_the_source_says(
    folder: Path, grammar: Grammar, tokenizer: Any, tmp_path: Path
) -> None:
    source = opened(folder)
    report = run([source], grammar, tokenizer, tmp_path / "out")
    found = documents(tmp_path / "out", "set", grammar)
    assert len(found) == len(source) == report.sources["set"].documents == 35
    for document, item in zip(found, (source[i] for i in range(35)), strict=True):
        assert document.asks == item.asks and len(document.parts) == len(item.parts)
        for part, original in zip(document.parts, item.parts, strict=True):
            if isinstance(original, ImagePart):
                assert part == CodesPart(tokenizer.encode(original.pixels[None])[0])
            else:
                assert part == original
    index = Shards(tmp_path / "out/set", 5).index
    assert index["pair"].tolist() == [True] * 20 + [False] * 15 and index["images"].sum() == 20 + 10 + 10
    one_way = opened(folder, reversible=False, files=("captions",), label="one way")
    run([one_way], grammar, tokenizer, tmp_path / "one way")
    assert not Shards(tmp_path / "one way/one-way", 3).index["pair"].any()
    assert report.sources["set"].tasks == {"text_to_image": 20, "image_to_text": 10, "interleaved": 5}
    assert Shards(tmp_path / "out/set", 5).item(33) == 33
    assert str(report) == str(load_report(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out/set").glob("*.npy")} > {"index.npy", "rows-512.npy"}


def test_interrupted_and_continued_equals_uninterrupted(
    folder: Path, grammar: Grammar, tokenizer: Any, kit: Any, tmp_path: Path
) -> None:
    whole, broken, killed = tmp_path / "whole", tmp_path / "broken", tmp_path / "killed"

    class Failing(kit.Tokenizer):
        def encode(self, pixels: np.ndarray) -> np.ndarray:
            if len(self.shapes) == 3:
                shutil.copytree(broken, killed)  # the state after a SIGKILL at this moment
                raise KeyboardInterrupt
            return super().encode(pixels)

    def sources() -> list[Source]:
        return [opened(folder), opened(folder, files=("docs",), label="stories")]

    run(sources(), grammar, tokenizer, whole)
    with pytest.raises(KeyboardInterrupt):
        run(sources(), grammar, Failing(), broken)
    assert any(broken.rglob("*.array_record")) and not any(broken.rglob("*~"))
    assert any(killed.rglob("*~"))
    for begun in (broken, killed):
        with pytest.raises(FileNotFoundError, match="run `prepare` until it finishes"):
            load_report(begun)
        again = kit.Tokenizer()
        run(sources(), grammar, again, begun)
        assert files(begun) == files(whole)
        assert len(again.shapes) < len(tokenizer.shapes), "finished shards were made again"
    run(sources(), grammar, never := kit.Tokenizer(), broken)
    assert not never.shapes, "a finished prepare was done again"


def test_images_that_are_known_are_not_encoded_again(
    folder: Path, grammar: Grammar, tokenizer: Any, kit: Any, tmp_path: Path
) -> None:
    def known(tokenizer: Any) -> Tokenizers:
        return Tokenizers([tokenizer], ImageCodes(tmp_path / "codes", tokenizer.hash, tokenizer.codebook_size))

    first = known(tokenizer)
    run([opened(folder, files=("captions",))], grammar, tokenizer, tmp_path / "out", tokenizers=first)
    assert (first.encoded, first.known) == (20, 0)
    (folder / "images/new.png").write_bytes(to_png(kit.image(77)))
    kit.write(folder / "vqa.jsonl", [dict(image=f"images/{i}.png", question="new?", answer="no") for i in (3, "new")])
    sources = [opened(folder, files=("captions",)), opened(folder, files=("vqa",), label="added")]
    run(sources, grammar, kit.Tokenizer(), tmp_path / "plain", max_tokens=256)
    second = known(again := kit.Tokenizer())
    run(sources, grammar, again, tmp_path / "again", max_tokens=256, tokenizers=second)
    assert (second.encoded, second.known) == (1, 20 + 1) and len(again.shapes) == 1
    assert files(tmp_path / "again") == files(tmp_path / "plain")
    other = kit.Tokenizer()
    other.hash = "another"
    assert known(other).codes.get(digest_of(kit.image(0))) is None


def test_replicas_share_the_batches_and_change_nothing(
    folder: Path, grammar: Grammar, tokenizer: Any, kit: Any, tmp_path: Path
) -> None:
    together = threading.Barrier(2)

    class Replica(kit.Tokenizer):
        def encode(self, pixels: np.ndarray) -> np.ndarray:
            if not self.shapes:
                together.wait(60)  # the first batches of both run at the same time
            return super().encode(pixels)

    run([opened(folder)], grammar, tokenizer, tmp_path / "one", batch_size=2)
    replicas = [Replica(), Replica()]
    run([opened(folder)], grammar, tokenizer, tmp_path / "two", batch_size=2, tokenizers=Tokenizers(replicas))
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_another_vocabulary_or_setting_is_refused(
    folder: Path, grammar: Grammar, tokenizer: Any, kit: Any, tmp_path: Path
) -> None:
    run([opened(folder)], grammar, tokenizer, tmp_path)
    with pytest.raises(ManifestMismatch, match="layout.height"):
        run([opened(folder)], kit.grammar(fixed_grid(2, 4)), tokenizer, tmp_path)
    with pytest.raises(workdir.StageMismatch, match="settings.max_tokens = 512, this run has 300"):
        run([opened(folder)], grammar, tokenizer, tmp_path, max_tokens=300)
    kit.write(folder / "docs.jsonl", [dict(segments=[dict(type="text", text="new")])])
    with pytest.raises(workdir.StageMismatch, match="sources"):
        run([opened(folder)], grammar, tokenizer, tmp_path)
    tokenizer.hash = "retrained"
    with pytest.raises(ManifestMismatch, match="'patch-means'.*'retrained'"):
        run([opened(folder)], grammar, tokenizer, tmp_path)


def test_bad_items_are_left_out_counted_and_change_nothing_else(
    folder: Path, grammar: Grammar, tokenizer: Any, kit: Any, tmp_path: Path
) -> None:
    run([opened(folder)], grammar, tokenizer, tmp_path / "clean")
    expected = kit.spoil(folder)
    report = run([opened(folder)], grammar, tokenizer, tmp_path / "spoilt")
    kinds = sorted(expected.values())
    assert report.sources["set"].skipped == {kind: kinds.count(kind) for kind in kinds}
    rows = [json.loads(row) for row in (tmp_path / "spoilt/skipped.jsonl").read_text().splitlines()]
    assert {"/".join(row["origin"].split("/")[-1:]): row["kind"] for row in rows} == expected
    assert all(row["reason"] for row in rows)
    clean, spoilt = (
        Shards(tmp_path / name / "set", len(list((tmp_path / name / "set").glob("*.array_record"))))
        for name in ("clean", "spoilt")
    )
    tokens = [[t.tokens.tobytes() for t in shards.read(range(len(shards)))] for shards in (clean, spoilt)]
    marked = grammar.encode(
        Document.of((TextPart("a <boi> b"), CodesPart(tokenizer.encode(kit.image(0)[None])[0])), 1)
    ).tokens
    assert marked.tobytes() in tokens[1] and marked.tobytes() not in tokens[0]
    tokens[1].remove(marked.tobytes())
    assert tokens[0] == tokens[1]


def test_a_source_of_which_nothing_is_left_is_refused_with_kinds_and_first_examples(
    folder: Path, grammar: Grammar, tokenizer: Any, kit: Any, tmp_path: Path
) -> None:
    def sources() -> list[Source]:
        return [opened(folder, files=(name,), label=name) for name in ("captions", "vqa", "docs")]

    kit.write(folder / "vqa.jsonl", [b"{", dict(image="nowhere.png", question="a?", answer="b"), b"{"])
    with pytest.raises(NothingLeft) as caught:
        run(sources(), grammar, tokenizer, tmp_path / "out")
    said = str(caught.value)
    assert "of source 'vqa': 2 bad_json, first " in said and "vqa.jsonl:1: bad_json: expected one JSON object" in said
    assert "1 missing_image, first " in said and "captions" not in said and "Repair them" in said
    assert not files(tmp_path / "out"), "shards with what was left out would be taken for good next time"
    report = run(sources(), grammar, tokenizer, tmp_path / "held-out", may_be_lost=True)
    assert report.sources["vqa"].documents == 0 and report.sources["captions"].documents == 20
    assert "WARNING: most of vqa is left out" in str(report) and str(report).count("WARNING") == 1
    (folder / "vqa.jsonl").write_bytes(b"")
    with pytest.raises(NothingLeft, match="source 'vqa' has no items"):
        run(sources(), grammar, tokenizer, tmp_path / "out")
    kit.write(folder / "vqa.jsonl", [dict(image="images/0.png", question="a?", answer="b")])
    assert run(sources(), grammar, tokenizer, tmp_path / "out").sources["vqa"].documents == 1


def test_images_go_in_full_batches_of_one_size_and_equal_ones_once(tmp_path: Path, kit: Any, tokenizer: Any) -> None:
    root = tmp_path / "set"
    (root / "images").mkdir(parents=True)
    sizes = [(16, 16), (16, 24), (24, 16), (40, 8)]
    for i in range(24):
        (root / f"images/{i}.png").write_bytes(to_png(kit.image(i, *sizes[i % 4])))
    rows = [dict(image=f"images/{i % 24}.png", question=f"{i}?", answer="no") for i in range(240)]
    kit.write(root / "vqa.jsonl", rows)
    grammar = kit.grammar(sized_rows(12, 12))
    resize = Resize("aspect", 16, 16, 4, 48, 48)
    run([opened(root)], grammar, tokenizer, tmp_path / "out", batch_size=4, shard_items=1000, resize=resize)
    assert len(tokenizer.shapes) <= 6 + 4 and all(shape[0] == 4 for shape in tokenizer.shapes)
    found = documents(tmp_path / "out", "set", grammar)
    assert [document.parts[1] for document in found] == [TextPart(f"{i}?") for i in range(240)]
    for i in (0, 1, 2, 3, 23):
        pixels = resize(kit.image(i, *sizes[i % 4]))
        assert found[i].parts[0] == found[i + 24].parts[0] == CodesPart(tokenizer.encode(pixels[None])[0])


def test_long_documents_are_split_at_paragraphs_or_left_out(tmp_path: Path, kit: Any, grammar: Grammar) -> None:
    paragraphs = ["a" * 30, "b" * 30, "c" * 60, "d" * 10]
    image = CodesPart(np.ones((4, 4), np.int32))
    pieces = split(Document.of((TextPart("\n\n".join(paragraphs)), image, TextPart("end"))), grammar, 64 + 2)
    assert [piece.parts for piece, _ in pieces] == [
        (TextPart("a" * 30 + "\n\n" + "b" * 30),),
        (TextPart("c" * 60),),
        (TextPart("d" * 10), image, TextPart("end")),
    ]
    recipe = "two\n" * 20
    lines = split(Document.of((TextPart("one\n\n" + recipe + "\nthree"),)), grammar, 30)
    words = [piece.parts[0].text.split() for piece, _ in lines]
    assert sum(words, []) == ["one", *["two"] * 20, "three"] and len(lines) == 4
    root = tmp_path / "set"
    root.mkdir()
    (root / "0.png").write_bytes(to_png(kit.image(0)))
    segments = [dict(type="text", text=text) for text in paragraphs] + [dict(type="image", image="0.png")]
    kit.write(root / "docs.jsonl", [dict(segments=segments), dict(segments=segments[:1])])
    kit.write(root / "captions.jsonl", [dict(image="0.png", text="e" * 70), dict(image="0.png", text="f")])
    report = run([opened(root)], grammar, kit.Tokenizer(), tmp_path / "out", max_tokens=66).sources["set"]
    assert report.skipped == {"too_long": 1} and report.split_items == 1
    assert report.documents == 1 + 3 + 1 and report.longest <= 66
    report = run([opened(root, files=("docs",))], grammar, kit.Tokenizer(), tmp_path / "small", max_tokens=19)
    assert report.sources["set"].skipped == {"too_long_part": 1}, "an image takes 20 tokens with <bos> and <eos>"
    (skipped,) = read_skipped(tmp_path / "small/set/00000.array_record")
    assert skipped["kind"] == "too_long_part" and "in one image or character" in skipped["reason"]


LONG = {
    "words": "word0 runs  over word1,\tand word2 " * 40,
    "no spaces": "\u8d64\u3044\u661f\u304c\u9752\u3044\u5186\u306e\u4e0a\u306b" * 30,
    "marks and joiners": "e\u0301\U0001f469\U0001f3fd\u200d\U0001f52c" * 60,
    "blanks": "a" + " " * 300 + "b",
    "one word among others": "short " * 5 + "x" * 200 + " short" * 5,
    "a line among lines": "one\n" + "word " * 60 + "\ntwo",
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("max_tokens", [40, 64])
def test_a_line_that_is_too_long_by_itself_is_cut_and_nothing_of_it_is_lost(
    grammar: Grammar, name: str, max_tokens: int
) -> None:
    text = LONG[name]
    pieces = [piece.parts[0].text for piece, _ in split(Document.of((TextPart(text),)), grammar, max_tokens)]
    joined = "".join(pieces)
    assert joined == text or ("lines" in name and joined.replace("\n", "") == text.replace("\n", ""))
    lengths = [len(grammar.encode(Document.of((TextPart(piece),)))) for piece in pieces]
    assert max(lengths) <= max_tokens
    if name == "words":
        assert all(piece[0].isspace() for piece in pieces[1:]), "cut before words"
        assert min(lengths[:-1]) > max_tokens - len("word0,") - 3, "each piece is as long as it can be"
    whole = characters(text)
    for piece in pieces:  # no character is separated from its marks
        assert all(character in whole for character in characters(piece))


def test_a_long_text_takes_time_in_proportion(grammar: Grammar) -> None:
    """Pieces are found by halving. Adding word after word would encode each piece a thousand times."""
    reads = 0

    base: Any = type(grammar.text_codec)

    class Counting(base):
        def encode(self, text: str) -> list[int]:
            nonlocal reads
            reads += len(text)
            return super().encode(text)

    counting = Grammar(grammar.vocabulary, grammar.layout, Counting())
    text = "ab " * 20_000
    pieces = split(Document.of((TextPart(text),)), counting, 4096)
    assert "".join(piece.parts[0].text for piece, _ in pieces) == text and len(pieces) == 15
    assert reads < 30 * len(text)
