"""Which files belong to a dataset, and which file a name means. Rows, images, texts and prompts use one rule."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ar_unified.data.checks.validate import validate
from ar_unified.data.files import FileError, Folder
from ar_unified.data.images import to_png
from ar_unified.data.sources import BadItem, Source, open_source, read, texts
from ar_unified.errors import UserError
from ar_unified.sampling.requests import PromptImage, read_requests


def kinds(source: Source) -> list[str]:
    """For each item, "" if it is good, else the kind of its fault."""
    return [item.kind if isinstance(item, BadItem) else "" for _, item in read(source, range(len(source)))]


def prompt_errors(folder: Path, names: list[str], links: bool = False) -> list[str]:
    """For each image of a prompt, the error of reading it, or ""."""
    content = [[{"type": "image", "image": name}] for name in names]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"content": c, "mode": "text"}) + "\n" for c in content))
    lines = read_requests(folder / "prompts.jsonl", cells=SimpleNamespace(factor=4, codes_per_position=1), links=links)
    errors = []
    for line in lines:
        (image,) = line.content
        assert isinstance(image, PromptImage)
        try:
            image.load()
            errors.append("")
        except ValueError as error:
            errors.append(str(error))
    return errors


@pytest.fixture
def hub(tmp_path: Path, folder: Path) -> Path:
    """The folder in the layout of the Hugging Face cache, where names are links to blobs."""
    snapshot = tmp_path / "datasets--me--set" / "snapshots" / "abc123"
    blobs = tmp_path / "datasets--me--set" / "blobs"
    blobs.mkdir(parents=True)
    (folder / "notes.txt").write_text("a text")
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        shutil.copy(file, blobs / str(number))
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    return snapshot


def test_a_dataset_is_read_where_the_hugging_face_cache_has_it(hub: Path, tmp_path: Path) -> None:
    assert kinds(open_source(dict(kind="folder", path=hub))) == [""] * 35
    assert kinds(open_source(dict(kind="jsonl", path=hub / "captions.jsonl"))) == [""] * 20
    assert kinds(open_source(dict(kind="images", path=hub))) == [""] * 20
    assert kinds(open_source(dict(kind="images", path=hub / "images"))) == [""] * 20
    assert kinds(open_source(dict(kind="text", path=hub, files=("*.txt",)))) == [""]
    assert prompt_errors(hub, ["images/3.png"]) == [""]
    (tmp_path / "secret.png").write_bytes((hub / "images/0.png").read_bytes())
    blob = Path(os.path.realpath(hub / "images/1.png"))
    blob.unlink()
    blob.symlink_to(tmp_path / "secret.png")
    assert kinds(open_source(dict(kind="folder", path=hub, files=("captions",))))[1] == "path_escapes", "out of blobs"


@pytest.fixture
def linked(tmp_path: Path, folder: Path) -> Path:
    """A folder whose images, texts and rows of questions are on another disk."""
    disk = tmp_path / "disk"
    shutil.move(folder / "images", disk / "images")
    shutil.move(folder / "vqa.jsonl", disk / "vqa.jsonl")
    (disk / "texts").mkdir()
    (disk / "texts" / "a.txt").write_text("far away")
    for name in ("images", "vqa.jsonl", "texts"):
        (folder / name).symlink_to(disk / name)
    (folder / "one.txt").symlink_to(disk / "texts" / "a.txt")
    return folder


def test_links_that_lead_out_are_refused_by_all_and_followed_when_told(linked: Path, tmp_path: Path) -> None:
    specs = {
        "rows": dict(kind="folder", path=linked, files=("captions",)),
        "jsonl": dict(kind="jsonl", path=linked / "captions.jsonl"),
        "images": dict(kind="images", path=linked),
        "text": dict(kind="text", path=linked, files=("*.txt",)),
    }
    # In a searched folder, a link is one item, also if it leads to a folder, whose content is unknown.
    counts = {"rows": (20, 20), "jsonl": (20, 20), "images": (2, 20), "text": (3, 2)}
    for name, spec in specs.items():
        (refused, followed), source = counts[name], open_source(spec)
        links = open_source({**spec, "links": True})
        assert kinds(source) == ["path_escapes"] * refused, name
        assert kinds(links) == [""] * followed and dict(links.fingerprint) != dict(source.fingerprint), name
        with pytest.raises(BadItem, match=f"is a link to {tmp_path / 'disk'}/.*, outside {linked}; links=True in the "):
            source[0]
    with pytest.raises(UserError, match=r"vqa.jsonl: vqa.jsonl is a link to .*/disk/vqa.jsonl, outside .* --links"):
        open_source(dict(kind="folder", path=linked))
    assert len(open_source(dict(kind="folder", path=linked, links=True))) == 35
    assert "images is a link to" in prompt_errors(linked, ["images/0.png"])[0]
    assert prompt_errors(linked, ["images/0.png"], links=True) == [""]
    assert not validate(linked, links=True, show_progress=False).bad
    with pytest.raises(UserError, match="links: expected True or False, found 'yes'"):
        open_source(dict(kind="images", path=linked, links="yes"))


def test_what_a_person_names_may_be_a_link(linked: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(linked)
    (tmp_path / "here.txt").symlink_to(tmp_path / "disk" / "texts" / "a.txt")
    real = shutil.copytree(tmp_path / "disk" / "images", linked / "real")
    (linked / "captions.jsonl").write_text(json.dumps(dict(image=str(real / "0.png"), text="by its real path")) + "\n")
    assert kinds(open_source(dict(kind="folder", path=tmp_path / "alias", files=("captions",)))) == [""]
    assert list(texts([open_source(dict(kind="text", path=tmp_path / "here.txt"))])) == ["far away"]


def test_loops_end_and_a_folder_is_read_once(tmp_path: Path, kit: Any) -> None:
    root = tmp_path / "set"
    (root / "real" / "deep").mkdir(parents=True)
    (tmp_path / "far").mkdir()
    for place in (root / "real", root / "real" / "deep", tmp_path / "far"):
        (place / "a.png").write_bytes(to_png(kit.image(0)))
        (place / "a.txt").write_text("text")
    for name, target in {
        "loop": root, "real/up": root / "real", "again": root / "real", "self.png": root / "self.png",
        "far": tmp_path / "far", "far too": tmp_path / "far", "above": tmp_path,
    }.items():  # fmt: skip
        (root / name).symlink_to(target)
    (tmp_path / "far" / "back").symlink_to(root)
    (root / "same.png").symlink_to(root / "real" / "a.png")

    def found(links: bool) -> list[str]:
        return [item.name for item in Folder(root, links).search(lambda name: name.endswith(".png")) if not item.error]

    assert found(False) == ["real/a.png", "real/deep/a.png", "same.png"]
    assert found(True) == ["above/far/a.png", "real/a.png", "real/deep/a.png", "same.png"]
    assert kinds(open_source(dict(kind="images", path=root))).count("unreadable_file") == 1, "self.png"
    assert len(list(texts([open_source(dict(kind="text", path=root, links=True))]))) == 3


LITTER = [
    "._a.png", ".hidden.png", ".ipynb_checkpoints/a.png", ".Trash/a.png", "@eaDir/a.png/SYNO.png", "__MACOSX/._a.png",
    "__MACOSX/a.png", "$RECYCLE.BIN/a.png", "#recycle/a.png", "deep/.git/a.png",
]  # fmt: skip


def test_hidden_files_are_no_part_of_a_dataset(tmp_path: Path, kit: Any) -> None:
    root = tmp_path / ".cache" / "set"  # below a hidden folder
    for name in [*LITTER, "b.JPG", "deep/a.png", "c.jfif", "d.Tiff", "e.pgm"]:
        for path in (root / name, (root / name).with_suffix(".txt")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(to_png(kit.image(0)) if path == root / name else b"text")
    images = open_source(dict(kind="images", path=root))
    assert [os.path.relpath(images.origin(i), root) for i in range(len(images))] == [
        "b.JPG", "c.jfif", "d.Tiff", "deep/a.png", "e.pgm",
    ]  # fmt: skip
    assert len(open_source(dict(kind="text", path=root))) == 5
    (root / "captions.jsonl").write_text(json.dumps(dict(image=".hidden.png", text="named by a row")) + "\n")
    assert kinds(open_source(dict(kind="folder", path=root))) == [""]


def test_a_name_is_found_in_either_unicode_form_and_never_guessed(tmp_path: Path, kit: Any) -> None:
    names = ["café/é.png", "图像 一.png", "a b#?%20.png", "emoji🙂.png", "ｱ.png"]
    for name in names:
        path = tmp_path / unicodedata.normalize("NFD", name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(to_png(kit.image(0)))
    asked = [unicodedata.normalize(form, name) for name in names for form in ("NFC", "NFD")]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(dict(image=n, text="x")) + "\n" for n in asked))
    assert kinds(open_source(dict(kind="folder", path=tmp_path))) == [""] * 10
    assert prompt_errors(tmp_path, asked) == [""] * 10
    folder = Folder(tmp_path)
    for name, said in {
        "CAFÉ/É.png": "no such file; did you mean 'cafe\u0301/e\u0301.png'?",
        "A b#?%20.PNG": "no such file; did you mean 'a b#?%20.png'?",
        "café\\é.png": "write names with '/'",
        "C:\\images\\a.png": "no such file; write names with '/'",
        "nothing.png": "no such file",
    }.items():
        with pytest.raises(FileError) as error:
            folder.read(name)
        assert error.value.kind == "missing_image" and said in error.value.reason, name
        assert said in prompt_errors(tmp_path, [name])[0]


def test_rows_in_other_letters_are_told_and_not_taken_for_texts(folder: Path) -> None:
    (folder / "captions.jsonl").rename(folder / "Captions.jsonl")
    for open_ in (lambda: open_source(dict(kind="folder", path=folder)), lambda: validate(folder, show_progress=False)):
        with pytest.raises(UserError, match="Captions.jsonl: expected a name in lower case: rename it to capt"):
            open_()
    with pytest.raises(UserError, match=r"captions.jsonl: no such file; did you mean 'Captions.jsonl'\?"):
        open_source(dict(kind="folder", path=folder, files=("captions",)))


def test_what_cannot_be_read_is_named_and_nothing_waits_for_a_pipe(
    tmp_path: Path, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pipe.png", "pipe.txt", "captions.jsonl"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / "a.txt").write_text("secret")
    scan = os.scandir

    def locked(path: Any) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", locked)
    source = open_source(dict(kind="text", path=tmp_path))
    found = {Path(item.origin).name: item.reason for _, item in read(source, range(4)) if isinstance(item, BadItem)}
    assert found == {
        "captions.jsonl": "expected a file, found a pipe",
        "gone.txt": "No such file or directory",
        "locked": "the folder cannot be read: Permission denied",
        "pipe.txt": "expected a file, found a pipe",
    }
    assert kinds(open_source(dict(kind="images", path=tmp_path))) == ["unreadable_file"] * 2
    with pytest.raises(UserError, match="captions.jsonl: .*expected a file, found a pipe"):
        open_source(dict(kind="folder", path=tmp_path))
    kit.write(tmp_path / "vqa.jsonl", [dict(image=f"{i}.png", question="?", answer="x") for i in range(4)])
    assert len(open_source(dict(kind="folder", path=tmp_path, files=("vqa",), split="[:50%]"))) == 2
    with pytest.raises(UserError, match="captions.jsonl: expected a folder"):
        open_source(dict(kind="images", path=tmp_path / "captions.jsonl"))


def test_an_empty_file_of_captions_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_bytes(b"")
    assert "captions: 0 items, 0 good (none), 0 bad" in str(validate(tmp_path, show_progress=False))


def test_patterns_of_names(tmp_path: Path) -> None:
    for name in ("a.txt", "sub/b.TXT", "sub/deep/c.txt", "sub/deep/d.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def found(pattern: str) -> list[str]:
        return list(texts([open_source(dict(kind="text", path=tmp_path, files=(pattern,)))]))

    assert found("*.txt") == found("**/*.txt") == ["a.txt", "sub/b.TXT", "sub/deep/c.txt"]
    assert found("sub/*.txt") == ["sub/b.TXT"] and found("deep/*") == ["sub/deep/c.txt", "sub/deep/d.md"]
    assert found("sub/**/*.txt") == ["sub/b.TXT", "sub/deep/c.txt"] and found("[bc].txt") == [
        "sub/b.TXT",
        "sub/deep/c.txt",
    ]


def test_files_that_differ_in_their_ending_are_two_languages(tmp_path: Path) -> None:
    for name in ("en.txt", "en.md", "nl.txt", "old/nl.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    source: Any = open_source(dict(kind="text", path=tmp_path, language="file"))
    assert [source.language(i) for i in range(4)] == ["en.md", "en.txt", "nl", "nl"]
