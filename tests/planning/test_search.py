"""The search for the fastest settings: small models, compiled for CPU devices instead of GPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ar_unified.planning import search as searching
from ar_unified.planning.plan import make_plan
from ar_unified.planning.report import text
from ar_unified.planning.targets import parse_target
from tests.planning.test_plan import SMALL, quiet

TARGET = parse_target("h200:8")


def test_candidates_that_compute_less_again_stand_first():
    run = replace(SMALL, model=replace(SMALL.model, scan_layers=True))
    found = {tuple(each.changes.values()): each for each in searching.candidates(run, TARGET)}
    assert {key[2] for key in found} == {1, 2, 4} and {key[1] for key in found} == {8, 16, 24, 32}
    by_remat = {remat: found[remat, 8, 2] for remat in ("none", "dots", "attention", "full")}
    seconds, least = ([getattr(each, field) for each in by_remat.values()] for field in ("seconds", "least"))
    assert seconds == sorted(seconds) and least == sorted(least, reverse=True)
    assert found["none", 16, 2].seconds < found["none", 8, 2].seconds  # more tokens share one read of the weights
    assert found["none", 8, 4].least < found["none", 8, 2].least


@pytest.mark.slow
def test_the_best_that_fits_is_planned_and_says_why(monkeypatch):
    """If settings do not fit, no larger ones are tried. The numbers equal those of a plan with the same settings."""
    asked = []

    def planned(run, target, advise, say):
        asked.append((run.model.remat, run.batch_size, run.mesh["fsdp"]))
        plan = make_plan(run, target, advise=advise, say=say)
        if run.model.remat == "none":
            plan |= {"fits": False, "refused": {"used": 9e12}}
        return plan

    monkeypatch.setattr(searching, "make_plan", planned)
    plan = searching.search(SMALL, TARGET, 3, say=quiet)
    found = plan["search"]
    assert len(asked) == len(found["tried"]) >= 3 and found["changes"]["model.remat"] != "none"
    refused = [each for each in found["tried"] if not each["fits"]]
    assert refused and all(each["changes"]["model.remat"] == "none" and each["peak"] == 9e12 for each in refused)
    kept = [each for each in found["tried"] if each["changes"] == found["changes"]]
    assert kept[0]["mfu"] == plan["programs"][0]["mfu"] == [max(e["mfu"][i] for e in found["tried"] if e["fits"])
                                                           for i in (0, 1)]  # fmt: skip
    said = text(plan)
    assert f"--config.model.remat={found['changes']['model.remat']}" in said and "does not fit" in said


def test_nothing_that_fits_is_an_error_with_the_least(monkeypatch):
    small = replace(TARGET, hardware=replace(TARGET.hardware, hbm=1000.0))
    with pytest.raises(ValueError, match=r"none of \d+ combinations .* the smallest needs"):
        searching.search(SMALL, small, say=quiet)
