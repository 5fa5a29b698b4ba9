"""Eight faked CPU devices and one compilation cache for the whole suite; both must be set before jax starts.

AR_UNIFIED_TEST_OPTIMIZED=1: XLA optimises as it does for users (make test-exact). One cache holds the programs of both
levels, because XLA_FLAGS is part of the key.
"""

import functools
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Torch's threads spin while they wait for each other: on two busy cores a tiny model takes 78 ms, with one thread 4 ms.
os.environ.setdefault("OMP_NUM_THREADS", "1")
_CACHE = Path(__file__).resolve().parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
# Every program is kept, however small: the other worker and the next module ask for most of them again.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Tests compile much and compute little. Compiling a gradient takes 6.7 s of CPU with users' settings, 2.7 s without
# XLA's late optimisations, and 0.7 s if it is also one module and has no fusion emitters (docs/tests_time.md).
OPTIMIZED = os.environ.get("AR_UNIFIED_TEST_OPTIMIZED", "") not in ("", "0")
if not OPTIMIZED:
    os.environ["XLA_FLAGS"] = " ".join([
        os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true", "--xla_cpu_parallel_codegen_split_count=1",
    ])  # fmt: skip
    # A flag that XLA does not know ends the process, and jaxlib 0.12 does not know this one any more.
    if version("jaxlib").split(".")[:2] == ["0", "10"]:
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

# The TPU compiler that `make libtpu` installs. Tests name a TPU but have none, so its metadata are not asked for, and
# several processes may load the compiler at once.
_LIBTPU = Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"
if _LIBTPU.exists():
    os.environ.setdefault("TPU_LIBRARY_PATH", str(_LIBTPU))
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

from ar_tokenizers.host import keep_memory  # noqa: E402

keep_memory()

import jax  # noqa: E402

jax.devices()  # fixes the number of devices; else a verb that plans for more would change it for later tests


# Files whose slow tests take longest, the longest first (docs/tests_time.md). All tests of a file run on one worker, so
# the longest files start first; else one worker would be idle at the end.
LONG = (
    "training/test_tokenizer_task", "cli/test_pages", "storage/test_workdir", "interop/test_parity",
    "training/test_loop", "test_wheel",
    "training/test_step", "model/test_on_tpu", "experiment/test_rollouts", "cli/test_changed_run",
    "parallel/test_processes", "cli/test_run", "model/test_transformer", "sampling/test_window",
    "cli/test_brought_tokenizer", "planning/test_decoding_on_tpu", "test_check_gpu", "cli/test_export",
)  # fmt: skip


MARKS = ("slow", "exact", "interop", "newest_jax")
source = functools.cache(lambda path: path.read_text("utf-8"))


def pytest_ignore_collect(collection_path, config):
    """Files without the mark that is asked for are not imported, because importing all files takes 15 s of CPU time."""
    if collection_path.name.startswith("test_") and collection_path.suffix == ".py":
        mark = re.fullmatch(r"(\w+)( and [\w ]+)?", config.option.markexpr)
        if mark and mark[1] in MARKS and " or " not in mark[0] and mark[1] not in source(collection_path):
            return True
    return None


def pytest_collection_modifyitems(items):
    """Quick tests keep their order, so that the tests of a folder reuse its compiled programs."""
    for item in items:  # pytest_ignore_collect works only if a file's source contains its marks
        unsaid = [
            mark.name for mark in item.iter_markers() if mark.name in MARKS and mark.name not in source(item.path)
        ]
        assert not unsaid, f"{item.nodeid}: its file does not say {unsaid}"
    here = Path(__file__).parent
    place = {here / f"{name}.py": i for i, name in enumerate(LONG)}

    def last_or(item):
        long = item.get_closest_marker("slow") or item.get_closest_marker("interop")
        return place.get(item.path, len(LONG)) if long else len(LONG)

    items.sort(key=last_or)


def pytest_runtest_teardown(item, nextitem):
    """The tests of a folder share programs in memory; kept for longer, these would grow to gigabytes in each worker."""
    if nextitem is None or nextitem.path.parent != item.path.parent:
        jax.clear_caches()
