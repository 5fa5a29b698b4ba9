"""The loss equals torch's cross-entropy with an odd number of ids: with one softmax over all ids, and with one per
modality."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.model.loss import token_losses
from ar_unified.parallel.mesh import make_mesh

USED, ROWS, D = 1006, 1024, 16  # the last 18 rows pad the head


@pytest.mark.interop
@pytest.mark.parametrize("mesh", [None, dict(fsdp=2, tensor=2)], ids=str)
@pytest.mark.parametrize("split", [None, 437])
def test_losses_and_gradients_are_torchs(split: int | None, mesh: dict[str, int] | None) -> None:
    torch = pytest.importorskip("torch", reason="parity with the reference implementations needs torch")
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(4, 24, D)), rng.normal(size=(ROWS, D)) * 0.5
    targets, weights = rng.integers(0, USED, (4, 24)), rng.random((4, 24))
    targets[0, :4] = [0, (split or 1) - 1, split or 1, USED - 1]
    total = weights.sum()

    ours: Any = [jnp.asarray(x, jnp.float32) for x in (hidden, head)]

    def loss(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        nll, _ = token_losses(hidden, head, jnp.asarray(targets, jnp.int32), 32, USED, split)
        return (jnp.asarray(weights, jnp.float32) * nll).sum() / total, nll

    devices = jax.devices()[: math.prod((mesh or {}).values())]
    with jax.set_mesh(make_mesh(mesh, devices)) if mesh else nullcontext():
        (found, nll), gradients = jax.device_get(jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*ours))

    theirs = [torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in ours]
    ids, logits = torch.tensor(targets.ravel()), theirs[0].reshape(-1, D) @ theirs[1][:USED].T
    if split is None:
        expected = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
    else:
        text, sides = ids < split, (logits[:, :split], logits[:, split:])
        own = torch.where(text, ids, 0), torch.where(text, 0, ids - split)
        each = [torch.nn.functional.cross_entropy(*side, reduction="none") for side in zip(sides, own, strict=True)]
        expected = torch.where(text, *each)
    mean = (torch.tensor(weights.ravel()) * expected).sum() / total
    mean.backward()
    np.testing.assert_allclose(found, mean.item(), rtol=1e-6)
    np.testing.assert_allclose(nll.ravel(), expected.detach().numpy(), rtol=1e-6, atol=1e-6)
    for gradient, tensor in zip(gradients, theirs, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=0, atol=1e-6)
