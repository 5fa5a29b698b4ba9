"""The page to look at a job's samples with: one file that needs no server and no network, beside its pictures.

The rows travel inside the page; cards are built as they come into view, and load thumbnails, so ten thousand samples
scroll like ten. A click shows the picture itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ar_unified.sampling.results import THUMBNAIL, read, thumbnail
from ar_unified.workdir import write_text


def write(folder: str | Path, title: str = "Samples") -> Path:
    """Writes `folder`/index.html from a job's lines, finished or not; returns its path. Raises OSError, ValueError."""
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
    page = _PAGE.replace("@TITLE@", title).replace("@THUMBNAIL@", str(THUMBNAIL)).replace("@DATA@", data)
    write_text(folder / "index.html", page)
    return folder / "index.html"


def _shown(folder: Path, part: dict[str, Any]) -> dict[str, Any]:
    """A part of a line, with the thumbnail of a large picture: jobs of an older version have none."""
    if max(part.get("height", 0), part.get("width", 0)) <= THUMBNAIL:
        return part
    small = thumbnail(Path(part["image"]))
    return part | {"thumbnail": small.as_posix()} if (folder / small).exists() else part


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark;
  --paper: light-dark(#f6f5f2, #16171a); --card: light-dark(#fff, #1f2125); --ink: light-dark(#1d1e20, #e9e8e4);
  --soft: light-dark(#77757a, #98969c); --line: light-dark(#e4e2dc, #303338); --mark: light-dark(#3b5bdb, #8aa2ff);
  --bad: light-dark(#b3261e, #ff8a80); }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
header { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .6rem 1.2rem; align-items: center;
  padding: .8rem clamp(1rem, 4vw, 3rem); background: color-mix(in srgb, var(--paper) 88%, transparent);
  backdrop-filter: blur(10px); border-bottom: 1px solid var(--line) }
h1 { margin: 0; font-size: 1.15rem; letter-spacing: -.01em }
#count { color: var(--soft); font-variant-numeric: tabular-nums }
input[type=search] { flex: 1 1 14rem; max-width: 30rem; margin-left: auto; padding: .45rem .8rem; font: inherit;
  color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 9px }
input[type=search]:focus-visible { outline: 2px solid var(--mark); outline-offset: 1px }
label { color: var(--soft); display: flex; gap: .4rem; align-items: center; cursor: pointer }
main { display: grid; gap: 1rem; padding: 1.2rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 100rem; margin: auto;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); grid-auto-flow: dense;
  align-items: start }
article { background: var(--card); border: 1px solid var(--line); border-radius: 14px; overflow: hidden;
  display: grid; grid-template-columns: minmax(8rem, 13rem) 1fr }
article.wide { grid-column: 1 / -1 }
.prompt { padding: 1rem; border-right: 1px solid var(--line); overflow-wrap: anywhere }
.prompt small { display: block; color: var(--soft); margin-bottom: .4rem; font: 12px ui-monospace, monospace }
.results { display: flex; flex-wrap: wrap; gap: 1rem; padding: 1rem }
figure { margin: 0; flex: 1 1 9rem; min-width: 0; max-width: 34rem }
figure:only-child { max-width: none }
.parts { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center }
.parts p, .prompt p { margin: .1rem 0; white-space: pre-wrap; flex: 0 1 14rem; min-width: 8rem;
  overflow-wrap: anywhere }
img { display: block; max-width: 100%; height: auto; border-radius: 8px; background: var(--line); cursor: zoom-in }
img.small { image-rendering: pixelated }
figcaption { margin-top: .4rem; color: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums }
.error { color: var(--bad) }
.ids { color: var(--soft); font: 12px ui-monospace, monospace }
#end { height: 1px; grid-column: 1 / -1 }
dialog { border: 0; padding: 0; background: none; max-width: none; max-height: none }
dialog::backdrop { background: #000c }
dialog img { width: min(88vw, 88vh); cursor: zoom-out }
@media (max-width: 40rem) { article { grid-template-columns: 1fr }
  .prompt { border-right: 0; border-bottom: 1px solid var(--line) } }
</style>
<header><h1>@TITLE@</h1><span id="count"></span>
<input type="search" id="filter" placeholder="Filter by prompt, answer or id" aria-label="Filter">
<label><input type="checkbox" id="errors"> errors only</label></header>
<main id="cards"><div id="end"></div></main>
<dialog id="zoom"><img alt=""></dialog>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const all = JSON.parse(document.getElementById("data").textContent);
const [cards, end, count, filter, errors, zoom] =
  ["cards", "end", "count", "filter", "errors", "zoom"].map(id => document.getElementById(id));
const texts = parts => parts.map(part => part.text || "").join(" ");
for (const card of all) {
  card.words = [card.id, texts(card.prompt), ...card.samples.flatMap(s => [texts(s.parts), s.error])]
    .join(" ").toLowerCase();
  card.failed = card.samples.some(s => s.error);
}
function make(tag, kind, text) {
  const node = document.createElement(tag);
  if (kind) node.className = kind;
  if (text) node.textContent = text;
  return node;
}
function picture(part) {
  const longer = Math.max(part.height, part.width), small = longer <= 160;
  const node = make("img", small ? "small" : "");
  // Whole factors keep the pixels of a small one square.
  const scale = small ? Math.floor(160 / longer) : Math.min(1, @THUMBNAIL@ / longer);
  node.loading = "lazy"; node.decoding = "async"; node.alt = ""; node.src = encodeURI(part.thumbnail || part.image);
  node.width = Math.round(part.width * scale); node.height = Math.round(part.height * scale);
  node.onclick = () => {
    zoom.firstChild.src = encodeURI(part.image); zoom.firstChild.className = node.className; zoom.showModal();
  };
  return node;
}
const fill = (node, parts) => {
  for (const part of parts)
    node.append(part.image ? picture(part) : make("p", part.ids && "ids", part.text || part.ids.join(" ")));
  return node;
};
function show(card) {
  const node = make("article", card.samples.length > 2 || card.samples.some(s => s.parts.length > 2) ? "wide" : "");
  const prompt = make("div", "prompt");
  prompt.append(make("small", "", card.id));
  fill(prompt, card.prompt);
  const results = make("div", "results");
  for (const sample of card.samples) {
    const figure = make("figure");
    if (sample.error) figure.append(make("p", "error", sample.error));
    figure.append(fill(make("div", "parts"), sample.parts));
    const number = card.samples.length > 1 && sample.n !== null ? `sample ${sample.n} · ` : "";
    figure.append(make("figcaption", "", number + sample.note + (sample.cut ? " · cut at its budget" : "")));
    results.append(figure);
  }
  node.append(prompt, results);
  return node;
}
let chosen = all, shown = 0;
const watch = new IntersectionObserver(seen => seen[0].isIntersecting && more(), { rootMargin: "1200px" });
function more() {
  const next = chosen.slice(shown, shown + 40);
  if (!next.length) return;
  end.before(...next.map(show));
  shown += next.length;
  watch.unobserve(end); watch.observe(end);  // asks again: the end may still be in view
}
function choose() {
  const words = filter.value.toLowerCase().split(/\\s+/).filter(Boolean);
  chosen = all.filter(card => words.every(word => card.words.includes(word)) && (!errors.checked || card.failed));
  const samples = chosen.reduce((sum, card) => sum + card.samples.length, 0);
  count.textContent = `${chosen.length.toLocaleString()} requests, ${samples.toLocaleString()} samples`;
  cards.replaceChildren(end);
  shown = 0;
  more();
  watch.observe(end);
}
filter.oninput = errors.onchange = choose;
zoom.onclick = () => zoom.close();
choose();
</script>
</html>
"""
