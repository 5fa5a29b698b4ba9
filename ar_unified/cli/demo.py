"""Run the demo: every stage of the experiment `shapes`, on data that come with the package.

It needs no files and no network, and takes 12 to 25 minutes on two CPU cores. Writes the same files into the workdir
as `run`; open report.html to see the results. If the demo is killed, start it again with the same command, and it
continues. Any config key may be changed. These changes make the demo shorter:

    ar-unified demo --workdir workdirs/quick --config.image_tokenizer.steps=300 --config.training.steps=300
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ar_unified.cli import run


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Runs every stage of the demo and says where its report is; returns the exit status."""
    status = run.main(arguments, overrides)
    print(f"Open {arguments.workdir}/report.html")
    return status
