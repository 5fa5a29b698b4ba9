"""`ar-unified` for tests that stop `prepare` in the middle, on a machine of any speed. It makes the first shard of
every source at once, but the other shards only after the file named by AR_UNIFIED_TEST_HOLD is removed.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from ar_unified.cli.main import main
from ar_unified.data.prepare.claims import Claims
from ar_unified.data.prepare.making import Piece, Progress, ShardMaker

HOLD = "AR_UNIFIED_TEST_HOLD"
_make = ShardMaker.make


def _held(self: ShardMaker, piece: Piece, claims: Claims, shown: Progress) -> None:
    while piece.number and Path(os.environ[HOLD]).exists():
        claims.renew()  # raises an error in a process that was told to stop
        time.sleep(0.02)
    _make(self, piece, claims, shown)


if __name__ == "__main__":
    ShardMaker.make = _held  # type: ignore[method-assign]
    sys.exit(main())
