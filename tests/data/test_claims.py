from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from ar_unified.data.prepare.claims import Claims, Team

PIECES = [f"set/{i:05d}" for i in range(12)]


class Job:
    """Which pieces are done, and by whom."""

    def __init__(self, folder: Path):
        self.folder, self.by = folder, dict[str, list[int]]()

    def claims(self, process: int, processes: int = 2, lease: float = 60.0, **options) -> Claims:
        return Claims(self.folder / ".claims", Team(process, processes, lease, **options))

    def does(self, process: int):
        def do(name: str) -> None:
            self.by.setdefault(name, []).append(process)

        return dict(done=lambda name: name in self.by, do=do)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_one_alone_does_all_in_order_and_writes_no_claims(job: Job) -> None:
    job.claims(0, 1).work(PIECES, **job.does(0))
    assert list(job.by) == PIECES and not (job.folder / ".claims").exists()


def test_each_begins_with_its_own_and_goes_on_with_what_others_have_not_begun(job: Job) -> None:
    job.claims(1, 3).work(PIECES, **job.does(1))
    mine = PIECES[1::3]
    assert list(job.by) == [*mine, *[name for name in reversed(PIECES) if name not in mine]]
    job.claims(0, 3).work(PIECES, **job.does(0))
    assert all(who == [1] for who in job.by.values()), "what is there was done again"
    assert not list((job.folder / ".claims").iterdir())


def test_two_at_once_do_each_piece_once(job: Job) -> None:
    def does(process: int):
        asked = job.does(process)
        return asked | dict(do=lambda name: (time.sleep(0.005), asked["do"](name)))

    threads = [threading.Thread(target=lambda i=i: job.claims(i, 3).work(PIECES, **does(i))) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(job.by) == PIECES and all(len(who) == 1 for who in job.by.values())
    assert {who for [who] in job.by.values()} == {0, 1, 2}


def killed(job: Job, process: int, name: str) -> Path:
    """Leaves the claim of a process that was killed while it made a piece."""

    def dies(name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.claims(process).work([name], done=lambda name: False, do=dies)
    (claim,) = (job.folder / ".claims").iterdir()
    return claim


def test_a_claim_that_is_renewed_is_left_alone_and_one_that_is_not_is_taken_over(job: Job) -> None:
    claim, said, began = killed(job, 0, PIECES[0]), [], time.monotonic()

    def alive() -> None:
        if (now := time.monotonic()) - began < 0.6:  # its owner is slow, but still runs
            claim.write_text(f"{now}")
            said.append(now)

    job.claims(1, lease=0.3, alive=alive).work(PIECES, **job.does(1))
    assert list(job.by)[-1] == PIECES[0] and time.monotonic() - said[-1] >= 0.3
    assert not list((job.folder / ".claims").iterdir())


def test_a_claim_that_is_still_empty_is_taken_over_as_late_as_any(job: Job) -> None:
    """Its owner was killed, or is slow, between creating the file and writing to it."""
    killed(job, 0, PIECES[0]).write_bytes(b"")
    began = time.monotonic()
    job.claims(1, lease=0.3).work(PIECES[:1], **job.does(1))
    assert job.by == {PIECES[0]: [1]} and time.monotonic() - began >= 0.3


def test_who_waits_for_others_can_be_stopped(job: Job) -> None:
    killed(job, 0, PIECES[0])
    calls = []

    def alive() -> None:
        calls.append(len(calls))
        if len(calls) > 3:
            raise SystemExit(143)

    with pytest.raises(SystemExit):
        job.claims(1, lease=0.8, alive=alive).work(PIECES[:1], **job.does(1))
    assert not job.by


def test_renewing_costs_nothing_until_it_is_due(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    claims, said, now = job.claims(0, lease=80.0), [], [1000.0]
    monkeypatch.setattr("ar_unified.data.prepare.claims.time.monotonic", lambda: now[0])

    def do(name: str) -> None:
        (claim,) = (job.folder / ".claims").iterdir()
        said.append(claim.read_bytes())
        assert not claims.renew() and claim.read_bytes() == said[0]
        now[0] += 10.1
        assert claims.renew() and not claims.renew()
        said.append(claim.read_bytes())

    claims.work(PIECES[:1], done=lambda _: len(said) == 2, do=do)
    assert said[0] != said[1]
