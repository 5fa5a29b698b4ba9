from __future__ import annotations

import jax
import pytest

from tests.training import tiny


@pytest.fixture(scope="session")
def params():
    """Fresh parameters of the tiny task, on the host."""
    return jax.device_get(jax.jit(tiny.task().init)(jax.random.key(0)))
