"""Use as a library: sums are right on a CPU with any order of imports, and the example of docs/library.md runs
unchanged."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import ar_unified
from tests import bundles

ROOT = Path(__file__).resolve().parents[1]
# jax issue 39103: with jaxlib 0.10.2's own reductions, the last of these sums is about 1071645696, without an error.
SUMS = """
import jax.numpy as jnp
i = jnp.arange(32769, dtype=jnp.float32)
x = jnp.stack([i, jnp.zeros_like(i), jnp.zeros_like(i)], axis=1)
print(float(jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(x)[-1]) == 32768.0**2)
"""
NEEDED = jax.__version_info__ < (0, 12)  # jaxlib versions from this one on are right by themselves


def python(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a new process, on one device, with only the given XLA_FLAGS and without a cache."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tokenizers'}", "JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=inherited | paths | environment, cwd=cwd, capture_output=True, text=True
    )


@pytest.mark.parametrize("first", ["import ar_unified", "import ar_tokenizers.text", "import jax, ar_unified.errors"])
def test_sums_are_right_after_an_import(first):
    done = python(f"{first}\nimport jax{SUMS}", PYTHONWARNINGS="error::RuntimeWarning")
    assert done.stdout == "True\n", done.stdout + done.stderr


def test_an_import_that_comes_too_late_says_so():
    done = python(f"import jax\njax.devices()\nimport ar_unified{SUMS}")
    assert done.stderr.count("RuntimeWarning: JAX has run before ar_unified") == NEEDED
    assert ("start with XLA_FLAGS=--xla_cpu" in done.stderr) == NEEDED
    assert done.stdout == f"{not NEEDED}\n", "where this jaxlib is right by itself, the switch and this test may go"


def test_flags_of_the_user_win():
    flag = "--xla_cpu_experimental_ynn_fusion_type="
    done = python("import os, ar_unified\nprint(os.environ['XLA_FLAGS'])", XLA_FLAGS=flag)
    assert done.stdout == f"{flag}\n"


def test_an_import_costs_little_and_names_come_when_they_are_used():
    heavy = ("jax", "jaxlib", "numpy", "PIL", "flax", "safetensors", "sentencepiece", "orbax")
    done = python(f"import sys, ar_unified\nprint(dir(ar_unified), [m for m in {heavy} if m in sys.modules])")
    assert done.stdout.endswith(" []\n") and "'load'" in done.stdout
    for name in ar_unified.__all__:
        assert callable(getattr(ar_unified, name)), name
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        ar_unified.laod  # noqa: B018


def test_the_page_has_every_method_with_its_own_arguments():
    rows = re.findall(
        r"^\| `(\w+)\(([^)]*)\)`", (ROOT / "docs" / "library.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    for name, arguments in rows:
        known = [
            str(each).partition(":")[0]
            for each in inspect.signature(getattr(ar_unified.Model, name)).parameters.values()
        ]
        assert not [each for each in re.split(r", ?", arguments) if each not in known], name
    public = {name for name, found in vars(ar_unified.Model).items() if inspect.isfunction(found) and name[0] != "_"}
    assert {name for name, _ in rows} == public - {"message", "parts"}, "these two are for other modules"


@pytest.mark.slow
def test_the_example_of_the_page_runs(tmp_path):
    """The example uses a bundle of untrained networks."""
    text = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert example, "docs/library.md has no example"
    bundles.write(tmp_path / "bundle")
    show = "print([image.size for image in images], type(answer).__name__)\n"
    done = python(example[1] + show, tmp_path, XLA_FLAGS=os.environ["XLA_FLAGS"])
    assert done.stdout == f"{[(16, 16)] * 4} str\n", done.stderr
