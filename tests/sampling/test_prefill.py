"""Long prompts are read in pieces, which gives the same keys, values and states."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.parallel.mesh import make_mesh
from ar_unified.sampling import steps
from tests.sampling.tiny import CONFIG, GRAMMARS, random_params


def weights():
    return jax.jit(functools.partial(steps.prepare, CONFIG, GRAMMARS["grid"], None))(random_params())


@pytest.mark.parametrize("shape", [None, dict(data=4, tensor=2)], ids=str)
def test_pieces_give_what_the_whole_prompt_gives(shape, monkeypatch):
    tokens = jax.random.randint(jax.random.key(0), (4, 64), 0, 16)
    lengths = jnp.array([64, 17, 16, 0])  # all tokens; one more than a piece of 16; one piece; none
    read = functools.partial(steps.prefill, CONFIG)
    whole = jax.jit(read)(weights(), tokens, lengths)
    monkeypatch.setattr(steps, "PIECE", 16)
    if shape is None:
        pieces = jax.jit(functools.partial(read))(weights(), tokens, lengths)
    else:
        with jax.set_mesh(make_mesh(shape)):
            pieces = jax.jit(functools.partial(read))(weights(), tokens, lengths)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-3)  # hidden states are as large as 50
    close(pieces.hidden[:3], whole.hidden[:3])
    for ours, theirs in zip(jax.tree.leaves(pieces.cache), jax.tree.leaves(whole.cache), strict=True):
        for row, length in enumerate(lengths):
            close(ours[row, :, :length], theirs[row, :, :length])
