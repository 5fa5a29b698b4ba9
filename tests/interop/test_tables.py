"""Every "yes" in the tables of README and docs/published_weights.md is tested."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import pytest

pytestmark = [pytest.mark.interop]
pytest.importorskip("torch", reason="what is compared stands in tests that need torch (make test-interop)")
pytest.importorskip("transformers", reason="what is compared stands in tests that need transformers")

from tests.interop import test_own, test_parity, test_processors, test_systems  # noqa: E402
from tests.interop.test_parity import CASES, DRAWING, EXPORTED, TUNED_HERE  # noqa: E402

ROOT = Path(__file__).parents[2]
COLUMNS = ("import", "text", "image", "interleaved", "fine-tune", "export")
TEXT_ALONE = {"llama", "llama_tied", "llama3", "qwen2", "qwen3", "gemma"}
# Row of docs/published_weights.md -> the cases of test_parity that test it.
ROWS: dict[str, tuple[str, ...]] = {
    "`chameleon` (transformers)": ("chameleon", "chameleon-swin"),
    "`chameleon` (Meta, 1 or 4 files)": ("meta",),
    "`anole`": ("anole",),
    "`lumina_mgpt` (1)": ("lumina_mgpt",),
    "`emu3`, `emu3_chat`, `emu3_gen` (transformers' port)": ("emu3",),
    "`emu3`, `emu3_chat`, `emu3_gen` (original)": ("emu3-original",),
    "`emu3_5`": ("emu3_5",),
    "`liquid`": ("liquid",),
    "`simplear`": ("simplear",),
    "`tar`": ("tar",),
    "`llama`, `qwen` (2, 3), `gemma` (1)": ("llama_tied", "llama3", "qwen2", "qwen3", "gemma"),
}
# Tests in other files, by row and column. Cells of other rows claim nothing.
_LUMINA_2 = "test_sixty_four_greedy_ids_of_lumina_2_are_its_twins"
_LWM = "test_sixty_four_greedy_ids_of_lwm_are_its_transcriptions"
ELSEWHERE: dict[str, dict[str, str]] = {
    "`lumina_mgpt` (2.0)": {
        "import": "test_lumina_2s_ids_are_its_own", "text": _LUMINA_2, "image": _LUMINA_2,
        "interleaved": "test_lumina_2s_logits_are_its_twins", "export": "test_lumina_2_comes_back",
        "fine-tune": "test_twenty_steps_of_fine_tuning_lumina_2_are_torchs",
    },
    "`lwm` (1M, vision)": {
        "import": "test_lwms_ids_are_its_own", "text": _LWM, "image": _LWM,
        "interleaved": "test_lwm_answers_with_both_tables_as_its_transcription",
        "export": "test_both_tables_of_lwm_come_back",
    },
    "`lwm` (text, `params`)": {"import": "test_lwms_stream_comes_back", "export": "test_lwms_stream_comes_back"},
    "a model trained here (`pre` norms; QK-norm none or RMS)": {
        "import": "test_a_text_model_comes_back", "export": "test_transformers_computes_the_same",
    },
}  # fmt: skip
# Rows of README's table, each of which covers one or more of the rows above.
README: dict[str, tuple[str, ...]] = {
    "Chameleon, transformers'": ("`chameleon` (transformers)",),
    "Chameleon, Meta's": ("`chameleon` (Meta, 1 or 4 files)",),
    "Anole": ("`anole`",),
    "Lumina-mGPT 1": ("`lumina_mgpt` (1)",),
    "Lumina-mGPT 2.0": ("`lumina_mgpt` (2.0)",),
    "Emu3, transformers'": ("`emu3`, `emu3_chat`, `emu3_gen` (transformers' port)",),
    "Emu3, original": ("`emu3`, `emu3_chat`, `emu3_gen` (original)",),
    "Emu3.5": ("`emu3_5`",),
    "LWM": ("`lwm` (1M, vision)",),
    "Liquid": ("`liquid`",),
    "SimpleAR, Tar": ("`simplear`", "`tar`"),
    "Llama, Qwen 2 and 3, Gemma": ("`llama`, `qwen` (2, 3), `gemma` (1)",),
}


def table(path: Path, first: str) -> dict[str, dict[str, str]]:
    """The cells, by row and column, of the table whose head begins with `first`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(first))
    names, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in [lines[at], *lines[at + 2 :]])
    found = {}
    for line, row in zip(lines[at + 2 :], rows, strict=False):
        if not line.startswith("|"):
            break
        found[row[0]] = dict(zip(names[1:], row[1:], strict=True))
    return found


DOCS = table(ROOT / "docs/published_weights.md", "| `--as` | import | text")


def says(cell: str) -> bool:
    return cell not in ("–", "")


def ran(names: Collection[str], among: Collection[str]) -> bool:
    return set(names) <= set(among)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_says_what_its_cases_show(row: str) -> None:
    names, cells = ROWS[row], DOCS[row]
    assert ran(names, CASES) and says(cells["import"]) and cells["text"] == "yes"
    assert ("with" in cells["import"]) == any("--image" in CASES[name].more for name in names) or "meta" in names
    assert cells["image"].startswith("drawn") == ran(names, DRAWING)
    assert (cells["fine-tune"] == "yes") == ran(names, TUNED_HERE)
    prompts = ran(names[:1], test_processors.SIDES)
    assert cells["interleaved"] == ("" if ran(names, TEXT_ALONE) else "prompts" if prompts else "logits")
    assert ("pixels" in cells["image"]) == prompts, "the same test decodes what is drawn"
    assert all(CASES[name].to in cells["export"] and (name in EXPORTED or name == "meta") for name in names)
    if "meta" in names:
        assert test_parity.test_metas_shards_come_back


@pytest.mark.parametrize("row", ELSEWHERE)
def test_a_row_says_what_its_own_tests_show(row: str) -> None:
    tests = ELSEWHERE[row]
    for column in COLUMNS:
        if says(cell := DOCS[row][column]):
            assert column in tests, f"{column}: {cell}"
    for name in tests.values():
        assert hasattr(test_systems, name) or hasattr(test_own, name), name


def test_every_row_is_backed_and_readme_says_the_same() -> None:
    assert set(DOCS) == {*ROWS, *ELSEWHERE}
    readme = table(ROOT / "README.md", "| | import | text")
    for label, rows in README.items():
        ours: Mapping[str, str] = readme[label]
        for row in rows:
            for column in ("text", "image", "interleaved", "fine-tune"):
                assert ours[column].split(",")[0] == DOCS[row][column].split(",")[0], f"{label}: {column}"
            assert says(ours["import"]) == says(DOCS[row]["import"]) and says(ours["export"]) == says(
                DOCS[row]["export"]
            )
    left = set(readme) - set(README)
    assert left == {
        "image tokenizers alone: Chameleon's, LlamaGen's", "Janus', Show-o's, Emu3's, Emu3.5's IBQ, LWM's, MoVQGAN",
        "a model trained here",
    }  # fmt: skip
