"""The probe of image ids: it learns what is predictable, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from ar_unified.training import probe


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = dict(d_model=32, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=16, d_mlp=64)
    monkeypatch.setattr(probe, "SHAPE", shape)
    monkeypatch.setattr(probe, "TOKENS", 256)


def ids(count: int, seed: int) -> np.ndarray:
    """Images of 4 x 4 ids of 16 codes. The first id is random, and each further one is 5 more than the one before."""
    start = np.random.default_rng(seed).integers(0, 16, (count, 1))
    return ((start + 5 * np.arange(16)) % 16).astype(np.int32).reshape(count, 4, 4)


def test_it_finds_the_order_in_ids_whose_entropy_is_that_of_noise(tiny: None) -> None:
    noise = np.random.default_rng(2).integers(0, 16, (40, 4, 4), np.int32)
    ordered = probe.train_probe(ids(100, 0), 16, steps=60)
    found = ordered(ids(21, 1))  # does not fill its last batch
    assert 4 / 16 - 0.02 < found["bits_per_id"] < 1  # only the first id of an image has 4 bits
    assert found["budget"]["epochs"] == 60 * 16 / 100 and found["budget"]["images"] == 100
    assert ordered(noise)["bits_per_id"] > 4
    assert found == probe.train_probe(ids(100, 0), 16, steps=60)(ids(21, 1))
    alone = [ordered(ids(21, 1)[i : i + 1])["bits_per_id"] for i in range(21)]
    assert found["bits_per_id"] == pytest.approx(np.mean(alone), rel=1e-5)  # rows that only pad a batch do not count
    assert probe.images_wanted(60, 16) == 960


def test_nothing_to_learn_from_is_refused(tiny: None) -> None:
    with pytest.raises(ValueError, match="at least 1 step and 1 image"):
        probe.train_probe(np.zeros((0, 4, 4), np.int32), 16, steps=1)
