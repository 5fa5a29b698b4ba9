"""The pages of the site that are made of other files of the repository; a hook of mkdocs (mkdocs.yml).

    index.md, install.md, contributing.md, changelog.md    README, BUILD, CONTRIBUTING and CHANGELOG of the repository
    api/<room>.md                              the docstrings of each package of ar_unified, and of ar_tokenizers
    source/<path>.md                           every file of the repository that a page links to, as it stands

Links lead where they lead in the repository, so that the same text is right in both places. A link to what is not there
ends the build. A page of docs/ that `nav` does not name is put at the end of its part "Tuning".
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import Abort
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {
    "README.md": "index.md",
    "BUILD.md": "install.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
PACKAGES = {"ar_unified": ROOT, "ar_tokenizers": ROOT / "tokenizers"}
LANGUAGES = {".py": "python", ".sh": "sh", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".toml": "toml"}
# [text](target) and ![text](target), outside of code; an anchor stays behind the path.
_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)#\s]+)(#[^)\s]*)?\)")
_FENCED = re.compile(r"(^```.*?^```\s*?$)", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the pages of docs/ that `nav` does not name."""
    named = set(re.findall(r"[\w/]+\.md", str(config.nav)))
    found = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    for part in config.nav or ():
        if isinstance(part, dict) and "Tuning" in part:
            part["Tuning"] += sorted(found - named)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages: those above, and a page for each file that any page links to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for page, text in _api().items():
        files.append(File.generated(config, page, content=text))
    linked = set()
    for file in files.documentation_pages():
        text = "".join(part for part in _FENCED.split(file.content_string) if not part.startswith("```"))
        for match in _LINK.finditer(text):
            if (target := _in_repository(match[2], file.src_uri)) is not None and _page_of(target).startswith(
                "source/"
            ):
                linked.add(target)
    for target in sorted(linked):
        files.append(File.generated(config, _page_of(target), content=_shown(target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The text of a page with links that lead where they lead in the repository."""
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown

    def moved(match: re.Match[str]) -> str:
        target = _in_repository(match[2], here)
        if target is None:
            return match[0]
        start = PurePosixPath(here).parent.as_posix()
        return f"{match[1]}{os.path.relpath(_page_of(target), start)}{match[3] or ''})"

    parts = _FENCED.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(moved, part) for part in parts)


def _in_repository(link: str, page: str) -> str | None:
    """The path below the repository that a link means, None for an address. Ends the build if it is not there."""
    if re.match(r"[a-z]+:", link):
        return None
    source = {made: file for file, made in PAGES.items()}.get(page, f"docs/{page}")
    path = (ROOT / PurePosixPath(source).parent / link).resolve()
    if page.startswith("api/"):  # there is no such file in the repository: such links mean pages
        return f"docs/{os.path.normpath(PurePosixPath(page).parent / link)}"
    if not path.exists() or not path.is_relative_to(ROOT):
        raise Abort(f"{source}: a link leads to {link}, which is not there")
    return path.relative_to(ROOT).as_posix()


def _page_of(path: str) -> str:
    """Where the site has a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/") and path != "docs/site.py":
        return path.removeprefix("docs/")
    return f"source/{path.lstrip('.')}.md"


def _shown(path: str) -> str:
    """A file of the repository as a page, or what a folder holds."""
    found = ROOT / path
    if found.is_dir():
        names = sorted(
            each.name + "/" * each.is_dir() for each in found.iterdir() if not each.name.startswith(("_", "."))
        )
        return f"# {path}/\n\n" + "".join(f"- `{name}`\n" for name in names)
    text = found.read_text(encoding="utf-8").rstrip("\n")
    fence = "`" * (max((len(run) for run in re.findall(r"`{3,}", text)), default=2) + 1)
    return f"# {path}\n\n{fence}{LANGUAGES.get(found.suffix, 'text')}\n{text}\n{fence}\n"


def _api() -> dict[str, str]:
    """A page of docstrings for each room, and one that lists them."""
    rooms: dict[str, list[str]] = {}
    for package, root in PACKAGES.items():
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            names = parts[:-1] if parts[-1] == "__init__" else parts
            if any(part.startswith("_") for part in names) or not _summary(path):
                continue
            room = ".".join(names[:2]) if (root / Path(*names[:2])).is_dir() else package
            rooms.setdefault(room, []).append(".".join(names))
    pages, rows = {}, []
    for room, modules in sorted(rooms.items()):
        pages[f"api/{room}.md"] = f"# {room}\n\n" + "".join(f"::: {module}\n\n" for module in sorted(modules))
        path = PACKAGES[room.partition(".")[0]] / room.replace(".", "/") / "__init__.py"
        rows.append(f"| [{room}]({room}.md) | {_summary(path)} |\n")
    table = "| room | |\n| --- | --- |\n" + "".join(rows)
    pages["api/index.md"] = f"# API\n\nEvery public name of every room, from its docstring.\n\n{table}"
    return pages


def _summary(path: Path) -> str:
    """The first paragraph of a module's docstring, on one line."""
    docstring: Any = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return " ".join((docstring or "").partition("\n\n")[0].split()).replace("|", "\\|").replace("<", "&lt;")
