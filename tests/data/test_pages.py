from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ar_unified.data.images import to_png
from ar_unified.data.items import texts_of
from ar_unified.data.sources import BadItem, open_source, read
from ar_unified.data.sources.markup import from_html, from_markdown
from ar_unified.errors import UserError
from ar_unified.language.document import ImagePart, TextPart

COOKING = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "based-cooking"


def said(parts: list[dict[str, Any]]) -> list[str]:
    """Texts, and images in angle brackets."""
    return [part["text"] if part["type"] == "text" else f"<{part['image']}>" for part in parts]


def test_markdown_keeps_the_order_of_text_and_images() -> None:
    page = (
        '---\ntitle: "Soup"\ntags: [hot]\n---\n\nFirst.\n\n![a [b] c](pix/a.webp "Title")\n\n## Next *one*\n\n'
        "![x](<b c.png>)![y](d(1).png)\n1. Do `![not](this.png)` it.\n\n```\n![nor](that.png)\n```\n\n"
        "[![z](e.png)](https://example.org/x) after ![r][one] and ![two][] <img width=3 src='f.png'>\n\n"
        "[one]: g.png\n[two]: <h.png> 'two'\n![unknown][three]\n"
    )
    assert said(from_markdown(page)) == [
        "# Soup", "First.", "<pix/a.webp>", "## Next *one*", "<b c.png>", "<d(1).png>",
        "1. Do `![not](this.png)` it.\n\n```\n![nor](that.png)\n```", "<e.png>", " after", "<g.png>", " and", "<h.png>",
        "<f.png>", "[one]: g.png\n[two]: <h.png> 'two'\n![unknown][three]",
    ]  # fmt: skip


def test_html_keeps_the_order_of_text_and_images() -> None:
    page = (
        "<html><head><title>T</title><style>p{}</style></head><body><h1>Soup &amp; more</h1><p>One\n two<br>three</p>"
        "<figure><img src=a.png alt=x><figcaption>Below</figcaption></figure><script>no()</script>"
        "<pre>a  b\n c</pre><ul><li>x<li>y</ul><img><p>broken <b>to the <img src='b.png'/> end"
    )
    assert said(from_html(page)) == [
        "Soup & more\n\nOne two\nthree",
        "<a.png>",
        "Below\n\na  b\n c\n\nx\n\ny\n\nbroken to the",
        "<b.png>",
        "end",
    ]


def test_pages_and_what_is_wrong_with_them(tmp_path: Path, kit: Any) -> None:
    (tmp_path / "set/pix").mkdir(parents=True)
    (tmp_path / "set/a").mkdir()
    (tmp_path / "outside.png").write_bytes(to_png(kit.image(0)))
    (tmp_path / "set/pix/1 a.png").write_bytes(to_png(kit.image(1)))
    pages = {
        "a/1.md": b"before\n\n![x](../pix/1%20a.png)\n\nafter ![y](/pix/1%20a.png)",
        "a/2.html": b"<p>caf\xc3\xa9<img src='../pix/1 a.png'>",
        "a/3.md": b"![x](nowhere.png)",
        "a/4.md": b"![x](https://example.org/a.png)",
        "a/5.md": b"![x](../../outside.png)",
        "a/6.md": b"caf\xe9",
        "a/7.html": b"<script>no text</script>",
        "a/8.md": b"text alone",
    }
    for name, data in pages.items():
        (tmp_path / "set" / name).write_bytes(data)
    source = open_source(dict(kind="pages", path=tmp_path / "set"))
    found = [item for _, item in read(source, range(8))]
    picture = ImagePart(kit.image(1))
    assert found[0].parts == (TextPart("before"), picture, TextPart("after"), picture)
    assert found[1].parts == (TextPart("café"), picture) and found[0].task == "interleaved"
    assert [item.kind for item in found[2:7] if isinstance(item, BadItem)] == [
        "missing_image", "missing_image", "path_escapes", "bad_utf8", "empty_text"
    ]  # fmt: skip
    assert found[3].origin.endswith("set/a/4.md") and found[7].id == "a/8.md"
    assert [texts for _, texts in texts_of(source, [0, 7])] == [["before", "after"], ["text alone"]]
    parts = [open_source(dict(kind="pages", path=tmp_path / "set", split=split)) for split in ("[:50%]", "[50%:]")]
    assert sorted(part.origin(i) for part in parts for i in range(len(part))) == [source.origin(i) for i in range(8)]
    with pytest.raises(UserError, match="expected files named"):
        open_source(dict(kind="pages", path=tmp_path / "set/pix"))


@pytest.mark.skipif(not COOKING.exists(), reason="the shared data is not beside this repository")
def test_recipes_written_as_pages_are_the_documents_of_their_rows(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (COOKING / "docs.jsonl").read_text().splitlines()]
    rows = [row for row in rows if any(part["type"] == "image" for part in row["segments"])][:20]
    (tmp_path / "images").symlink_to(COOKING / "images")
    for number, row in enumerate(rows):
        pieces = [
            part["text"] if part["type"] == "text" else f"![{part.get('alt', '')}]({part['image']})"
            for part in row["segments"]
        ]
        (tmp_path / f"{number:02d}.md").write_text("\n\n".join(pieces) + "\n")
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pages = open_source(dict(kind="pages", path=tmp_path, links=True))
    told = open_source(dict(kind="folder", path=tmp_path, files=("docs",), links=True))
    assert len(pages) == 20
    for i in range(20):
        assert [part if isinstance(part, ImagePart) else part.text.strip() for part in pages[i].parts] == [
            part if isinstance(part, ImagePart) else part.text.strip() for part in told[i].parts
        ], rows[i]["id"]
