"""Random moments at which tests kill processes. They differ in each run, and are printed so that they can be
repeated."""

from __future__ import annotations

import os
import random


def random_moments() -> random.Random:
    """A generator whose seed is printed (pytest shows it if a test fails). AR_UNIFIED_TEST_SEED sets the seed."""
    seed = int(os.environ.get("AR_UNIFIED_TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"random moments: AR_UNIFIED_TEST_SEED={seed} brings them again", flush=True)
    return random.Random(seed)
