"""Images like photographs: large shapes, even light, some detail. All are different."""

from __future__ import annotations

import numpy as np

from ar_unified.data.images import resize


def picture(seed: int, height: int = 64, width: int = 64) -> np.ndarray:
    """uint8 [height, width, 3]."""
    random = np.random.default_rng(seed)
    layers = [resize(random.integers(0, 256, (side, side, 3), np.uint8), height, width) for side in (3, 5, 9)]
    return (np.array(layers, np.float32) * np.array([0.5, 0.35, 0.15])[:, None, None, None]).sum(0).astype(np.uint8)
