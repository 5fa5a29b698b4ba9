"""Sources in a store equal those on disk: the same items, texts, fingerprints and shards."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ar_unified.cli.main import main
from ar_unified.data.images import to_png
from ar_unified.data.prepare import prepare
from ar_unified.data.sources import BadItem, open_source, read
from ar_unified.data.sources.shard_names import TABLES, shards
from ar_unified.errors import UserError
from ar_unified.language.document import ImagePart
from ar_unified.language.syntax import fixed_grid
from ar_unified.storage import stores
from tests.data import copies
from tests.data.conftest import Kit
from tests.data.test_formats import examples
from tests.stores import Disturbed, Store, objects, put_folder, using


def shown(source: Any, root: str) -> list[Any]:
    """Every item in a form that can be compared, without the place of the source."""
    found: list[Any] = []
    for i, item in read(source, range(len(source))):
        if isinstance(item, BadItem):
            found.append((item.kind, item.origin.replace(root, ""), item.reason.replace(root, "")))
            continue
        parts = [part.pixels.tobytes() if isinstance(part, ImagePart) else part for part in item.parts]
        found.append((item.id, item.origin.replace(root, ""), source.texts(i), parts))
    return found


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A spec for every kind of source below one folder."""
    root = tmp_path_factory.mktemp("sets")
    given = examples(Kit, "docs", 20)
    specs = {
        "folder": copies.folder(root / "folder", "docs", given),
        "jsonl": copies.jsonl(root / "own.jsonl", given),
        "parquet": copies.parquet(root / "parquet", given),
        "arrow": copies.arrow(root / "arrow", given),
        "webdataset": copies.webdataset(root / "tars", given),
        "images": dict(kind="images", path=str(root / "folder")),
    }
    import gzip

    import pyarrow as pa

    rows = (root / "own.jsonl").read_bytes()
    (root / "packed.jsonl.gz").write_bytes(gzip.compress(rows))
    with pa.output_stream(str(root / "packed.jsonl.zst"), compression="zstd") as stream:
        stream.write(rows)
    specs |= {ending: dict(kind="jsonl", path=str(root / f"packed.jsonl.{ending}")) for ending in ("gz", "zst")}
    (root / "texts" / "deep").mkdir(parents=True)
    for name, text in {"a.txt": "one\ntwo\n", "deep/b.md": "three", "c.jsonl": '{"text": "four"}\n{"no": 1}\n'}.items():
        (root / "texts" / name).write_text(text)
    specs["text"] = dict(kind="text", path=str(root / "texts"), by="line", language="file")
    (root / "pages").mkdir()
    (root / "pages" / "p.md").write_text("before\n\n![](i/x.png)\n\nafter")
    (root / "pages" / "lost.md").write_text("![](none.png) and ![](../../own.jsonl)")
    (root / "pages" / "i").mkdir()
    (root / "pages" / "i" / "x.png").write_bytes(to_png(Kit.image(1)))
    specs["pages"] = dict(kind="pages", path=str(root / "pages"))
    for frame in range(3):
        (root / "clips" / "c").mkdir(parents=True, exist_ok=True)
        (root / "clips" / "c" / f"{frame}.png").write_bytes(to_png(Kit.image(frame)))
    (root / "clips" / "c.txt").write_text("it moves")
    specs["clips"] = dict(kind="clips", path=str(root / "clips"))
    return {"": dict(root=str(root)), **specs}


def there(spec: dict[str, Any], root: str, url: str) -> dict[str, Any]:
    return spec | {"path": spec["path"].replace(root, url)}


def test_every_kind_of_source_is_the_same_in_a_store(sets: dict[str, dict[str, Any]], url: str) -> None:
    root = sets[""]["root"]
    put_folder(Path(root), url)
    for kind, spec in sets.items():
        if not kind:
            continue
        here, far = open_source(spec), open_source(there(spec, root, url))
        assert (far.name, len(far), far.fingerprint) == (here.name, len(here), here.fingerprint), kind
        found = shown(far, url)
        # Only the message for one picture differs, because a store has no links and no parent folders.
        assert [item[:2] for item in found] == [item[:2] for item in shown(here, root)], kind
        assert [i for i in found if len(i) > 3] == [i for i in shown(here, root) if len(i) > 3], kind
    for part in ("[:50%]", "[50%:]"):
        for kind in ("folder", "parquet", "webdataset", "text", "pages"):
            spec = sets[kind] | {"split": part}
            far = open_source(there(spec, root, url))
            assert far.fingerprint == open_source(spec).fingerprint, kind


def test_names_with_braces_and_wildcards_are_the_same(sets: dict[str, dict[str, Any]], url: str) -> None:
    root = sets[""]["root"]
    put_folder(Path(root) / "parquet", f"{url}/parquet")
    for name in ("", "/data", "/data/train-{00002,00000}-of-00003.parquet", "/data/*-00001-*", "/**/*.parquet"):
        here, far = (shards(f"{top}/parquet{name}", TABLES) for top in (root, url))
        assert far[1] == here[1] and str(far[0]).replace(url, "") == str(here[0]).replace(root, ""), name
    for name, words in {
        "/data/{1,2}.parquet": r"/data/1.parquet: no such file",
        "/data/x*": "no file matches this name",
        "/none": "no such file or folder",
    }.items():
        with pytest.raises(UserError, match=words):
            shards(f"{url}/parquet{name}", TABLES)


@pytest.mark.slow
def test_shards_of_sources_in_a_store_are_the_same_bytes_though_requests_fail(
    sets: dict[str, dict[str, Any]], url: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, grammar = sets[""]["root"], Kit.grammar(fixed_grid(4, 4))
    put_folder(Path(root), url)
    monkeypatch.setattr(stores, "_pauses", lambda: iter([0.01] * 20 + [None]))  # half of the requests fail
    kinds: dict[int, int | str] = {2: 503, 3: "torn", 5: "cut", 6: 500}
    between = Disturbed(store, lambda method, path, number: kinds.get(number % 8))

    def shards_of(specs: list[dict[str, Any]], out: Path) -> dict[str, bytes]:
        sources = [open_source(spec | {"label": f"s{i}"}) for i, spec in enumerate(specs)]
        prepare(sources, grammar, Kit.Tokenizer(), out, max_tokens=512, shard_items=16, show_progress=False)
        return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}

    specs = [sets[kind] for kind in ("folder", "parquet", "webdataset", "text")]
    here = shards_of(specs, tmp_path / "here")
    try:
        with using(store.variables(between.port)):
            far = shards_of([there(spec, root, url) for spec in specs], tmp_path / "far")
    finally:
        between.close()
    assert between.faults > 20
    assert {name: data.replace(url.encode(), root.encode()) for name, data in far.items()} == here


def test_a_store_that_fails_makes_no_item_bad(
    sets: dict[str, dict[str, Any]], url: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If an item cannot be read because the store fails, it is not left out: the run stops and says why."""
    root = sets[""]["root"]
    put_folder(Path(root), url)
    monkeypatch.setenv("AR_UNIFIED_STORE_PATIENCE", "0")
    broken: list[int] = []
    between = Disturbed(store, lambda method, path, number: broken[0] if broken else None)
    try:
        with using(store.variables(between.port)):
            for kind in ("folder", "parquet", "webdataset", "text", "images", "pages", "clips", "gz", "zst"):
                for status, error in ((503, stores.StoreFailed), (403, stores.StoreRefused)):
                    broken.clear()
                    source = open_source(there(sets[kind], root, url))
                    broken.append(status)
                    with pytest.raises(error):
                        list(read(source, range(len(source))))
    finally:
        between.close()


def test_hostile_names_are_named_and_lead_nowhere(url: str, tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in ("../out.txt", "good.txt"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"hi"))
    whole = stream.getvalue()
    stores.write(f"{url}/t/a.tar", whole)
    stores.write(f"{url}/t/cut.tar", whole[:700])
    found = [item if isinstance(item, BadItem) else item.id for _, item in read_all(f"{url}/t", "webdataset")]
    bad = [item.kind for item in found if isinstance(item, BadItem)]
    assert bad == ["path_escapes", "path_escapes", "unreadable_file"] and len(found) == 4

    stores.write(f"{url}/i/good.png", to_png(np.zeros((8, 8, 3), np.uint8)))
    stores.write(f"{url}/i/a//b.png", b"x")
    stores.write(f"{url}/i/.hidden/c.png", b"x")
    stores.write(f"{url}/i/dir.png/", b"")
    kinds = [item.kind if isinstance(item, BadItem) else "good" for _, item in read_all(f"{url}/i", "images")]
    assert sorted(kinds) == ["good", "path_escapes"]

    rows = [{"image": name, "text": "t"} for name in ("../../other/x.png", "/x.png", "s3://bucket/x.png", "no.png")]
    stores.write(f"{url}/f/captions.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    stores.write(f"{url.rsplit('/', 1)[0]}/other/x.png", b"not to be read")
    kinds = [item.kind for _, item in read_all(f"{url}/f", "folder") if isinstance(item, BadItem)]
    assert kinds == ["path_escapes", "path_escapes", "missing_image", "missing_image"]


def read_all(path: str, kind: str) -> Any:
    source = open_source(dict(kind=kind, path=path))
    return read(source, range(len(source)))


def test_validate_takes_a_url(sets: dict[str, dict[str, Any]], url: str, tmp_path: Path) -> None:
    root = sets[""]["root"]
    put_folder(Path(root), url)
    said = {}
    for top in (root, url):
        for name in ("folder", "parquet", "tars", "texts", "own.jsonl", "none"):
            page = tmp_path / f"{len(said)}.html"
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
                status = main(["validate", f"{top}/{name}", "--output", str(page)])
            lines = (out.getvalue() + errors.getvalue()).replace(top, "TOP").splitlines()
            said[top, name] = status, [line for line in lines if not line.startswith("page:") and "items/s" not in line]
            assert page.exists() == (name != "none"), lines
    for name in ("folder", "parquet", "tars", "texts", "own.jsonl", "none"):
        assert said[url, name][0] == said[root, name][0], said[url, name]
        if name != "none":
            assert [line for line in said[url, name][1] if "items" in line] == [
                line for line in said[root, name][1] if "items" in line
            ]
    assert any("no such folder or file" in line for line in said[url, "none"][1]), said[url, "none"]


def test_urls_are_refused_where_nothing_reads_them(url: str, tmp_path: Path) -> None:
    for argv in (
        ["import", "--from", f"{url}/weights", "--as", "chameleon", "--output", str(tmp_path / "out")],
        ["validate", str(tmp_path), "--output", f"{url}/page.html"],
    ):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert main(argv) == 2
        assert "only --workdir and sources may be URLs" in said.getvalue()
    assert not objects(url)
