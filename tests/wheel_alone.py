"""An environment with the wheel and its dependencies, but nothing of the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Alone:
    """names: the wheel's files. variables: the environment of its processes, with one CPU device."""

    python: Path
    names: tuple[str, ...]
    variables: dict[str, str]

    def run(self, program: str, *arguments: str, cwd: Path) -> str:
        """The standard output of `python -c program`, which must succeed."""
        call = [str(self.python), "-c", program, *arguments]
        done = subprocess.run(call, env=self.variables, cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout


def environment(folder: Path) -> Alone:
    """Makes the environment in `folder`. Skips the test if no wheel can be built."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"no wheel can be built here: {built.stderr.strip().splitlines()[-1]:.100}")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    (site,) = (folder / "venv" / "lib").glob("python3*/site-packages")
    (made,) = folder.glob("ar_unified-*.whl")
    with zipfile.ZipFile(made) as archive:
        archive.extractall(site)
        names = tuple(archive.namelist())
    shared = [path for path in sys.path if path.endswith("site-packages")]
    (site / "zz_dependencies.pth").write_text("\n".join(shared) + "\n")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return Alone(folder / "venv" / "bin" / "python", names, kept | {"JAX_NUM_CPU_DEVICES": "1"})
