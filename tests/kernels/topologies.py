"""TPUs for which tests compile on a CPU, with libtpu. `make libtpu` installs it, and conftest.py says where it is."""

from __future__ import annotations

import importlib.util
import os

import pytest

TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

needs_libtpu = pytest.mark.skipif(
    "TPU_LIBRARY_PATH" not in os.environ and importlib.util.find_spec("libtpu") is None,
    reason="no libtpu here, which compiles for TPUs (make libtpu)",
)
