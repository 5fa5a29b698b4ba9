"""The gallery of results records runs, and its page is made only from these records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ar_unified.errors import UserError
from ar_unified.evaluation import report
from ar_unified.experiment import config as configs
from ar_unified.workdir import read_json, write_json
from experiments.benchmarks import gallery


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """The files of a run that a record reads."""
    found = tmp_path / "work"
    for folder in ("samples/images/a", "samples/images/b", "model", "image_tokenizer"):
        (found / folder).mkdir(parents=True)
    write_json(found / "config.json", configs.plain(configs.defaults()) | {"name": "mine"})
    write_json(found / "evaluation.json", {"parse_rate": 1.0, "caption_exact": 0.5, "counts": {"caption_exact": 8}})
    attempts = [{"seconds": {"step": 50.0, "down": 0.0}}, {"seconds": {"step": 70.0, "down": 1000.0}}]
    write_json(found / "model" / "goodput.json", attempts)
    Image.new("RGB", (32, 16), (255, 0, 0)).save(found / "samples/images/a/0.png")
    Image.new("RGB", (16, 16), (0, 0, 255)).save(found / "samples/images/b/0.png")
    return found


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    found = tmp_path / "docs"
    found.mkdir()
    (found / "results.md").write_text(f"# Results\n\n{gallery.BEGIN}old\n{gallery.END}\n\nBy hand.\n")
    return found


def test_a_run_becomes_a_row_and_a_picture(workdir, docs):
    before = sorted(workdir.rglob("*"))
    gallery.record(workdir, "mine", "A note.", docs)
    assert sorted(workdir.rglob("*")) == before, "a record changes nothing in the workdir"
    found = json.loads((docs / "results" / "mine.json").read_text())
    assert found["metrics"] == {"parse_rate": 1.0, "caption_exact": 0.5} and found["seconds"] == {"model": 120.0}
    with Image.open(docs / "results" / "mine.png") as sheet:
        assert sheet.size == (2 * (gallery.SIDE + 4), gallery.SIDE + 4)
        assert sheet.getpixel((10, 10)) == (255, 0, 0) and sheet.getpixel((gallery.SIDE + 14, 10)) == (0, 0, 255)
        assert sheet.getpixel((10, gallery.SIDE - 2)) == (255, 255, 255), "an image keeps its shape"
    gallery.write(docs)
    page = (docs / "results.md").read_text()
    assert "| `mine` |" in page and "Captions 0.5" in page and "model 2.0 min" in page and "A note." in page
    assert "](results/mine.png)" in page and "old" not in page and page.endswith("\n\nBy hand.\n")
    gallery.write(docs)
    assert (docs / "results.md").read_text() == page


def test_commit_and_machine_are_those_of_the_run(workdir, docs, monkeypatch):
    """Commit and machine come from the run's report, because the record may be made later, from another commit."""
    ran = {"devices": "8 x TPU v5p, 2 process", "jax": "0.1", "written": "2026-01-02 03:04 UTC", "revision": "abc<1>"}
    with monkeypatch.context() as then:
        then.setattr(report, "environment", lambda: ran)
        report.write_report(
            workdir / "report.html",
            title="mine",
            evaluation=read_json(workdir / "evaluation.json"),
            facts={"jax": "no"},
        )
    assert read_json(gallery.record(workdir, "mine", "", docs))["environment"] == ran
    gallery.write(docs)
    assert "8 x TPU v5p, 2 process, jax 0.1 | abc<1>, 2026-01-02" in (docs / "results.md").read_text()


def test_what_cannot_be_recorded_is_told(workdir, docs):
    (workdir / "evaluation.json").unlink()
    with pytest.raises(UserError, match="evaluation.json: no such file"):
        gallery.record(workdir, "mine", "", docs)
    assert not (docs / "results").exists()
    (docs / "results.md").write_text("# Results\n")
    with pytest.raises(UserError, match="expected the marks"):
        gallery.write(docs)


def test_the_page_of_the_repository_is_as_its_records_say(tmp_path):
    """Nothing between the marks is edited by hand."""
    page = (gallery.DOCS / "results.md").read_text(encoding="utf-8")
    (tmp_path / "results.md").write_text(page, encoding="utf-8")
    if (gallery.DOCS / "results").exists():
        (tmp_path / "results").symlink_to(gallery.DOCS / "results")
    gallery.write(tmp_path)
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == page
