"""Writes the web page that shows a job's samples: one file next to the images, which needs no server and no network.

The page contains the job's rows. It builds cards as they come into view and loads thumbnails, so ten thousand samples
scroll like ten. A click shows the full image.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from ar_unified.manifests import Json
from ar_unified.sampling.results import THUMBNAIL, read, thumbnail
from ar_unified.workdir import write_text


def write(folder: str | Path, title: str = "Samples") -> Path:
    """Writes `folder`/index.html from the lines of a job, even if the job is not finished. Returns the page's path.

    Raises OSError, ValueError.
    """
    folder = Path(folder)
    groups: dict[tuple[int, str], dict[str, Any]] = {}
    for row in read(folder):
        key = row["line"], row["id"]
        if key not in groups:
            groups[key] = {"id": row["id"], "prompt": [_shown(folder, part) for part in row["prompt"]], "samples": []}
        group = groups[key]
        group["samples"].append({
            "n": row["sample"],
            "parts": [_shown(folder, part) for part in row.get("segments", [])],
            "error": row.get("error", ""),
            "note": f"seed {row['seed']} · guidance {row['guidance']:g} · {len(row['tokens'])} tokens"
            if "tokens" in row else f"line {row['line']}",
            "cut": row.get("finish_reason") == "length",
        })  # fmt: skip
    cards = [groups[key] for key in sorted(groups)]
    for card in cards:
        card["samples"].sort(key=lambda sample: -1 if sample["n"] is None else sample["n"])
    data = json.dumps(cards, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    write_text(folder / "index.html", _page(title, data))
    return folder / "index.html"


def _page(title: str, data: str) -> str:
    """The page, made of the gallery.* files in the folder of this module."""
    here = files("ar_unified.sampling")
    page, style, script = (
        here.joinpath(f"gallery.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    script = script.replace("@THUMBNAIL@", str(THUMBNAIL))
    for name, part in {"TITLE": title, "STYLE": style, "SCRIPT": script, "DATA": data}.items():
        page = page.replace(f"@{name}@", part)
    return page


def _shown(folder: Path, part: dict[str, Any]) -> dict[str, Json]:
    """A part of a line in the form that the page reads. A large image gets its thumbnail, if the job made one (older
    versions did not).
    """
    if max(part.get("height", 0), part.get("width", 0)) <= THUMBNAIL:
        return part
    small = thumbnail(Path(part["image"]))
    return part | {"thumbnail": small.as_posix()} if (folder / small).exists() else part
