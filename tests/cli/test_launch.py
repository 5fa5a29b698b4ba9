"""The launchers: experiments/launch/slurm.sh on two fake nodes, which are two real processes here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import ROOT, command
from tests.parallel.job import environment, free_port

SRUN = """#!/bin/bash
# Starts the two tasks of a step as SLURM does, each with what JAX reads of it.
export SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost,elsewhere SLURM_LOCALID=0
shift
SLURM_PROCID=1 "$@" &
SLURM_PROCID=0 "$@" && wait $!
"""


@pytest.mark.slow
def test_slurm_trains_both_tokenizers_on_two_nodes(folder: Path, tmp_path: Path) -> None:
    program = f'#!/bin/bash\nexec {sys.executable} -m ar_unified.cli.main "$@"\n'
    for name, text in {"srun": SRUN, "ar-unified": program}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    workdir = tmp_path / "workdir"
    found = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "JAX_COORDINATOR_PORT": str(free_port())}
    done = subprocess.run(
        [
            "bash",
            ROOT / "experiments/launch/slurm.sh",
            *command("tokenizer", folder, workdir, image_tokenizer__steps=4),
        ],
        env=environment() | found,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (workdir / "image_tokenizer" / "weights.safetensors").exists()
    lines = done.stdout.splitlines()
    assert "image_tokenizer: 0.02M parameters on data=2" in done.stdout
    assert len([line for line in lines if line.startswith("==== text_tokenizer")]) == 2  # begun and ended, by process 0
    assert "step 4/4" in (workdir / "logs" / "process-1.log").read_text()
