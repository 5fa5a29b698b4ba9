"""Decides from small pictures of two images whether the images are copies of each other.

A copy may be scaled, recompressed, or cropped a little. If the original is moved and stretched by a few percent, it
equals the copy again. So one picture is aligned with the other (by Gauss-Newton steps that move its sides, as Lucas and
Kanade do). If no difference remains, they are copies. Pictures that only look alike (two emoji of one face, two photos
of one dress) differ somewhere in every alignment.

Axes: `P` pairs, `N` pixels of a side, `C` colours.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDE = 32  # pixels of each side of a small picture, whatever the image's shape
LARGEST_CUT = 0.12  # largest part of a side that may be missing in the smaller of two copies
_MANY, _BATCH = 4096, 64  # pairs read at once; pairs computed at once (their arrays fit into the cache)
_STEPS = 5
_USUAL_CUT, _NOISE = 0.05, 6  # usual crop as a share of a side; usual noise in grey values
# Limits of `alike` that separate copies from look-alikes (photos and emoji); see experiments/benchmarks/duplicates.py
_COARSE, _ROUGH, _LEFT, _TINT = 28.0, 22.0, 1.6, 5.0


def small(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [SIDE, SIDE, 3]. The aspect is not kept, so images of different aspect can be
    compared.
    """
    # reducing_gap: a large image is first shrunk by whole factors.
    image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(image)


def alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which pairs of small pictures, uint8 [P, SIDE, SIDE, 3] each, are copies: bool [P].

    First, the root mean square of the remaining difference in grey values must be less than _COARSE at a quarter of the
    size, and less than _ROUGH at half of the size. Then two conditions must be true at full size, in every colour. At
    every place, the difference (averaged over 3 x 3 pixels) is less than _LEFT times (16 grey values + the height of
    the edges there). This limit is higher at edges, because they are never aligned exactly. And the median difference
    is less than _TINT grey values.
    """
    found = np.zeros(len(a), bool)
    for at in range(0, len(a), _MANY):
        those = slice(at, at + _MANY)
        found[those] = _alike(a[those], b[those])
    return found


def _alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    near = np.zeros(len(a), bool)
    for at in range(0, len(a), _BATCH):
        those = slice(at, at + _BATCH)
        near[those] = _could_be(*(_half(_half(_grey(_floats(x[those])))) for x in (a, b)))
    found = near.copy()
    left = np.flatnonzero(near)
    for at in range(0, len(left), _BATCH):
        chosen = left[at : at + _BATCH]
        found[chosen] = _fit(_floats(a[chosen]), _floats(b[chosen]))
    return found


def _fit(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """All checks of `alike` except the first one, for pictures float32 [P, C, N, N]."""
    found = np.zeros(len(a), bool)
    grey_a, grey_b = _half(_grey(a)), _half(_grey(b))
    still = np.zeros((len(a), 4), np.float32)
    there, error = _laid(grey_a, grey_b, still, _STEPS)
    back, other = _laid(grey_b, grey_a, still, _STEPS)  # either picture may be a part of the other, so both are tried
    (near,) = np.nonzero(np.minimum(error, other) < _ROUGH)
    if len(near):
        turned = (other < error)[near, None, None, None]
        larger, smaller = np.where(turned, b[near], a[near]), np.where(turned, a[near], b[near])
        move = np.where(turned[:, :, 0, 0], back[near], there[near])
        move, _ = _laid(_grey(larger), _grey(smaller), move, 2)
        found[near] = _same(*_warped(larger, move), smaller)
    return found


def _could_be(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which pairs, float32 [P, N, N] each, may match after the best small move. This is a quick estimate from the
    slopes of the pictures.
    """
    slopes = _slopes((a + b) / 2)
    left = (a - b).reshape(len(a), -1, 1)
    pull = slopes @ left
    error = (left * left).sum((1, 2)) - (pull * np.linalg.solve(_curvature(slopes), pull)).sum((1, 2))
    return error < _COARSE**2 * left.shape[1]


def _same(a: np.ndarray, seen: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether two aligned pictures, float32 [P, C, N, N], are equal wherever `seen`, bool [P, N, N], is true."""
    difference = a - b
    tint = np.nanmedian(np.where(seen[:, None], difference, np.nan), axis=(2, 3))
    left = _blurred(np.abs(difference).max(1) * seen)
    edges = _blurred(np.hypot(*np.gradient(_grey(b), axis=(1, 2))))
    return ((left / (16 + edges)).max((1, 2)) < _LEFT) & (np.abs(tint).max(1) < _TINT)


def _laid(a: np.ndarray, b: np.ndarray, move: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the moves that align each image of `a` with the image of `b`, float32 [P, N, N], starting from `move`.

    A move is four numbers: the shift of the centre and the stretch, each vertical and horizontal. Returns the moves,
    [P, 4], and the root mean square of the remaining difference, [P].
    """
    slopes = _slopes(b)
    inverse = np.linalg.inv(_curvature(slopes))
    best, least = move.copy(), np.full(len(a), np.inf)
    for step in range(steps + 1):
        moved, seen = _warped(a[:, None], move)
        left = (moved[:, 0] - b) * seen
        error = np.sqrt((left * left).sum((1, 2)) / seen.sum((1, 2)))
        better = error < least
        best[better], least[better] = move[better], error[better]
        if step < steps:
            move = move - (inverse @ (slopes @ left.reshape(len(a), -1, 1)))[..., 0]
            move = np.clip(move, -LARGEST_CUT, LARGEST_CUT).astype(np.float32)
    return best, least


def _slopes(a: np.ndarray) -> np.ndarray:
    """The derivatives of images, float32 [P, N, N], with respect to the four numbers of a move: [P, 4, N * N]."""
    P, N = a.shape[:2]
    u = _centres(N)
    down, right = (gradient * N for gradient in np.gradient(a, axis=(1, 2)))
    return np.stack([down, right, down * u[:, None], right * u], 1).reshape(P, 4, N * N)


def _curvature(slopes: np.ndarray) -> np.ndarray:
    """The Hessian, [P, 4, 4]. It includes a prior on moves and noise, so an image without an edge is not moved."""
    hessian = slopes @ slopes.transpose(0, 2, 1)
    hessian[:, range(4), range(4)] += (_NOISE / _USUAL_CUT) ** 2 * slopes.shape[2] / 256
    return hessian


def _warped(a: np.ndarray, move: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images, float32 [P, C, N, N], after a move, and which pixels the moved image covers, bool [P, N, N]."""
    N = a.shape[-1]
    rows, seen_rows = _read(move[:, 0], move[:, 2], N)
    columns, seen_columns = _read(move[:, 1], move[:, 3], N)
    moved = rows[:, None] @ a @ columns.transpose(0, 2, 1)[:, None]
    return moved, seen_rows[:, :, None] & seen_columns[:, None, :]


def _read(centre: np.ndarray, stretch: np.ndarray, N: int) -> tuple[np.ndarray, np.ndarray]:
    """The weight of each source line for each new line, float32 [P, N, N] (linear interpolation), and whether the new
    line is inside the image.
    """
    at = (centre[:, None] + (1 + stretch[:, None]) * _centres(N) + 0.5) * N - 0.5
    weight = np.maximum(0, 1 - np.abs(np.clip(at, 0, N - 1)[..., None] - np.arange(N, dtype=np.float32)))
    return weight.astype(np.float32), (at >= -0.5) & (at <= N - 0.5)


def _centres(N: int) -> np.ndarray:
    """The places of pixels, from -1/2 to 1/2."""
    return ((np.arange(N) + 0.5) / N - 0.5).astype(np.float32)


def _floats(a: np.ndarray) -> np.ndarray:
    """uint8 [P, N, N, C] -> float32 [P, C, N, N]."""
    return np.ascontiguousarray(a.transpose(0, 3, 1, 2), np.float32)


def _grey(a: np.ndarray) -> np.ndarray:
    """float32 [P, 3, N, N] -> [P, N, N], the luma of Rec. 601."""
    return 0.299 * a[:, 0] + 0.587 * a[:, 1] + 0.114 * a[:, 2]


def _half(a: np.ndarray) -> np.ndarray:
    """Images, float32 [P, N, N], at half the size."""
    return (a[:, ::2, ::2] + a[:, 1::2, ::2] + a[:, ::2, 1::2] + a[:, 1::2, 1::2]) / 4


def _blurred(a: np.ndarray) -> np.ndarray:
    """Images, float32 [P, N, N], averaged over 3 x 3 pixels with the weights 1 2 1."""
    a = np.pad(a, ((0, 0), (1, 1), (1, 1)), mode="edge")
    a = (a[:, :-2] + 2 * a[:, 1:-1] + a[:, 2:]) / 4
    return (a[:, :, :-2] + 2 * a[:, :, 1:-1] + a[:, :, 2:]) / 4
