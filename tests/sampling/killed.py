"""A job of many small requests, to be killed: python -m tests.sampling.killed REQUESTS OUTPUT [K/N]"""

from __future__ import annotations

import sys
import time

from ar_unified.sampling.engine import Engine
from ar_unified.sampling.job import run_job
from tests.sampling.test_job import DEFAULTS, Tiles, few_programs
from tests.sampling.tiny import CONFIG, GRAMMARS, random_params


class Slow(Tiles):
    """Slows the job down, so that a kill may happen between images and lines."""

    def decode(self, codes):
        time.sleep(0.05)
        return super().decode(codes)


if __name__ == "__main__":
    requests, output, *process = sys.argv[1:]
    k, n = process[0].split("/") if process else ("0", "1")
    few_programs(setattr)
    engine = Engine(CONFIG, random_params(), GRAMMARS["grid"], batch_size=4, max_length=64)
    report = run_job(
        engine, Slow(), requests, output, defaults=DEFAULTS, weights="w", process=(int(k), int(n)), show_progress=False
    )
    print(report)
