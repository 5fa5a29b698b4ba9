from __future__ import annotations

import pytest

from ar_unified.training.goodput import Goodput, describe, shares


class Time:
    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now

    time = perf_counter


@pytest.fixture
def clock(monkeypatch):
    clock = Time()
    monkeypatch.setattr("ar_unified.training.goodput.time", clock)
    return clock


def test_every_second_belongs_to_one_activity(clock, tmp_path):
    first = Goodput(tmp_path / "goodput.json", 0)
    with first.during("compile"):
        clock.now += 20
    clock.now += 100
    assert first.write(10) == {"goodput": 100 / 120, "time/compile": 20 / 120}
    clock.now += 50  # five more steps before a kill, which were never logged
    clock.now += 30

    again = Goodput(tmp_path / "goodput.json", 8)  # from the checkpoint of step 8: steps 9 and 10 are done again
    clock.now += 20
    with pytest.raises(RuntimeError), again.during("validation"):
        clock.now += 10
        raise RuntimeError
    account = again.write(10)
    wall = 120 + 80 + 30
    assert account == pytest.approx({
        "goodput": (80 + 20) / wall, "time/down": 80 / wall, "time/redone": 20 / wall,
        "time/compile": 20 / wall, "time/validation": 10 / wall,
    })  # fmt: skip
    assert sum(account.values()) == pytest.approx(1)
    assert describe(account) == "goodput 43.5% (down 34.8%, redone 8.7%, compile 8.7%, validation 4.3%)"


def test_an_attempt_without_a_step_and_a_torn_file(clock, tmp_path):
    path = tmp_path / "goodput.json"
    path.write_text("[{")
    first = Goodput(path, 5)
    clock.now += 4
    first.write(5)
    clock.now += 4
    second = Goodput(path, 5)
    clock.now += 8
    assert second.write(6) == {"goodput": 0.5, "time/down": 0.25, "time/start": 0.25}
    watcher = Goodput(tmp_path / "other.json", 0, active=False)
    watcher.write(1)
    assert not (tmp_path / "other.json").exists()
    assert shares([]) == {"goodput": 0.0}
