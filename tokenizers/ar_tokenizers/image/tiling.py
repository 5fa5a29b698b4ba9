"""Encodes and decodes images in overlapping windows of one size, if they are too large for memory as a whole.

Axes: B batch, H W pixels, h w codes. Lengths are in codes unless another unit is named.

A window does not see beyond its edges. So its results are wrong near an edge that lies inside the image, as far as the
network's receptive field reaches. Each code is taken from the window in which it is nearer to the middle, so each
window discards half of the overlap. Pixels are blended over the middle half of each overlap, and the quarter on each
side is discarded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np


def map_windows(
    function: Callable[[np.ndarray], np.ndarray],
    x: np.ndarray,
    *,
    scales: tuple[int, int],
    tile: int,
    overlap: int,
    blend: bool,
) -> np.ndarray:
    """Computes function(x) in windows.

    Args:
      function: [n, th * scales[0], tw * scales[0], ...] -> [n, th * scales[1], tw * scales[1], ...].
      x: [B, h * scales[0], w * scales[0], ...].
      scales: the numbers of entries of x and of the result along the side of one code: (factor, 1) to encode,
        (1, factor) to decode.
      tile: the side of a window in codes; a smaller image is a single window.
      overlap: the least overlap of neighbouring windows, in codes.
      blend: whether to blend overlaps (pixels) or to cut them in the middle (codes).

    Returns:
      [B, h * scales[1], w * scales[1], ...]

    Raises:
      ValueError: the overlap is negative, or more than half a tile.
    """
    if not 0 <= overlap <= tile // 2:
        raise ValueError(f"windows of {tile} codes may overlap by 0 to {tile // 2} codes, got {overlap}")
    height, width = (side // scales[0] for side in x.shape[1:3])
    tops, lefts = _starts(height, tile, overlap), _starts(width, tile, overlap)
    reads, writes = scales

    def strip(top: int) -> np.ndarray:
        rows = x[:, top * reads : (top + tile) * reads]
        windows = np.concatenate([rows[:, :, left * reads : (left + tile) * reads] for left in lefts])
        return _join(np.split(function(windows), len(lefts)), [left * writes for left in lefts], 2, blend)

    return _join(map(strip, tops), [top * writes for top in tops], 1, blend)


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """The first positions of windows, evenly spaced."""
    if length <= tile:
        return [0]
    last = math.ceil((length - tile) / (tile - overlap))
    return [i * (length - tile) // last for i in range(last + 1)]


def _join(pieces: Iterable[np.ndarray], starts: Sequence[int], axis: int, blend: bool) -> np.ndarray:
    """Joins overlapping pieces that begin at `starts` along `axis`, which is 1 or 2. The pieces have at least 3
    axes."""
    finished: list[np.ndarray] = []
    begin = 0  # start of the last piece in `finished`
    for start, piece in zip(starts, pieces, strict=True):
        piece = np.moveaxis(piece, axis, 0)
        if finished:
            before, shared = np.split(finished.pop(), [start - begin])
            new, rest = np.split(piece, [len(shared)])
            finished += [before, np.concatenate([_mix(shared, new, blend), rest])]
        else:
            finished.append(piece)
        begin = start
    return np.moveaxis(np.concatenate(finished), 0, axis)


def _mix(old: np.ndarray, new: np.ndarray, blend: bool) -> np.ndarray:
    """Blends one overlap of two pieces, along the first axis."""
    if not blend:
        return np.concatenate([old[: len(old) // 2], new[len(old) // 2 :]])
    middle = (np.arange(len(old), dtype=np.float32) + 0.5) / max(len(old), 1)
    weight = np.clip(2 * middle - 0.5, 0, 1).reshape(-1, *[1] * (old.ndim - 1))
    return np.round(old + weight * (new.astype(np.float32) - old)).astype(old.dtype)
