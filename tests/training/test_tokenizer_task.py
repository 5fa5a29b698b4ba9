from __future__ import annotations

import jax
import numpy as np
from ar_tokenizers.image.config import AutoencoderConfig

from ar_unified.checkpoint import restore_params
from ar_unified.training.tasks import TokenizerTask
from ar_unified.training.telemetry import read_metrics
from tests.training import tiny


def flat(step: int, *part: int) -> dict[str, np.ndarray]:
    """Pictures of one colour each."""
    colours = np.random.default_rng(step).integers(0, 256, (8, 1, 1, 3))
    return {"pixels": np.broadcast_to(colours, (8, 8, 8, 3)).astype(np.uint8)}


def test_the_loop_trains_an_image_tokenizer(tmp_path):
    config = AutoencoderConfig(factor=4, patch=4, width=8, multipliers=(1,), blocks=(0,), quantizer="vq", codes=16)
    task = TokenizerTask(config, flat, validation=[flat(99)])
    params = tiny.run(tmp_path, task=task, steps=4, log_every=1, validate_every=4, accumulation=2)
    *rows, last = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and last["validation/psnr"] > 0
    assert {"loss", "psnr", "codes/usage", "codes/perplexity", "images_per_second"} <= set(rows[0])
    assert 0 < rows[0]["codes/usage"] <= 1
    assert "mfu" not in rows[0]  # its FLOPs are not counted, so none are claimed
    stored = restore_params(tmp_path / "checkpoints")
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (stored, params)]
    assert sizes[0] == sizes[1]
