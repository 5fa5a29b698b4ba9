"""The new slot of each row: the kernel writes the same as XLA's scatter and nothing else, in place."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.kernels.cache_write import cache_write, tpu

# dtype, K, S, H: windows of slots as rows of tiles or as lanes, with the heads of one core or of both.
CASES = {
    "float32": (jnp.float32, 2, 64, 128),
    "bfloat16, odd heads": (jnp.bfloat16, 3, 64, 128),
    "head dim 64": (jnp.bfloat16, 2, 256, 64),
    "int8": (jnp.int8, 4, 256, 128),
    "int8, head dim 64": (jnp.int8, 2, 128, 64),
    "float8": (jnp.float8_e4m3fn, 1, 64, 256),
}


def arrays(dtype, K, S, H, slots):
    """A cache, the new entries, and their slots."""
    random, B = np.random.default_rng(0), len(slots)

    def numbers(*shape):
        return jnp.asarray(random.integers(-99, 99, shape)).astype(dtype)

    layer, new = ((numbers(B, K, *s, H), numbers(B, K, *s, H)) for s in ((S,), ()))
    if dtype == jnp.int8:
        layer += tuple(jnp.asarray(random.random((B, K, 1, S), np.float32)) for _ in range(2))
        new += tuple(jnp.asarray(random.random((B, K), np.float32)) for _ in range(2))
    return layer, new, jnp.array(slots, jnp.int32)


@pytest.mark.parametrize("name", CASES)
def test_what_is_new_is_written_and_nothing_else_is(name, monkeypatch):
    dtype, K, S, H = CASES[name]
    slots = [0, S - 1, 17, S, -1, 33, *range(2, 12)]  # S and -1 are no slots
    layer, new, where = arrays(dtype, K, S, H, slots)
    # In two groups: windows of one are in flight while the other is written.
    monkeypatch.setattr(tpu, "_rows", lambda layer: 8)
    assert tpu.unsupported(layer) is None
    for backend in ("xla", "tpu_interpret"):
        written = jax.jit(functools.partial(cache_write, backend=backend))(layer, new, where)
        for old, x, found in zip(layer, new, written, strict=True):
            expected = np.array(old.astype(np.float32))
            for b, s in enumerate(slots):
                if 0 <= s < S:
                    expected[b, :, 0 if x.ndim == 2 else s, s if x.ndim == 2 else slice(None)] = x[b].astype(np.float32)
            np.testing.assert_array_equal(found.astype(np.float32), expected, err_msg=backend)


def test_groups_of_rows_are_written_alike():
    layer, new, where = arrays(jnp.bfloat16, 2, 64, 128, list(range(12)))
    one, other = (cache_write(layer, new, where, backend=backend) for backend in ("xla", "tpu_interpret"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("shape", [(1, 2, 60, 128), (1, 2, 192, 64), (1, 2, 64, 32)])
def test_what_has_no_whole_windows_is_left_to_xla(shape):
    _, K, S, H = shape
    layer, new, where = arrays(jnp.bfloat16, K, S, H, [3])
    assert "expected a head dim in multiples of 64" in (tpu.unsupported(layer) or "")
    found = jax.jit(functools.partial(cache_write, backend="tpu_interpret"))(layer, new, where)
    np.testing.assert_array_equal(found[0][0, :, 3], new[0][0])


def test_what_does_not_fit_is_refused_in_words():
    layer, new, where = arrays(jnp.int8, 2, 128, 64, [3, 4])
    for wrong, said in (
        ((layer, new, where[:1]), "expected slots int32"),
        ((layer, (new[0].astype(jnp.float32), *new[1:]), where), "expected new entries int8"),
        ((layer, (*new[:3], new[3][:1]), where), r"expected new entries float32 \(2, 2\)"),
    ):
        with pytest.raises(ValueError, match=said):
            cache_write(*wrong)
