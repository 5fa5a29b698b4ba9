"""Measures how good an image tokenizer is on images that it was not trained on, under one fixed protocol.

Every number depends on the images' number, size and resizing, on rounding, and on whether errors or decibels are
averaged. Therefore all of this is fixed here and written together with the numbers (`PROTOCOL`). A number from a
network is reported only with the sha256 of the network's weight file.

Axes: B batch, N images of a set, H W pixels, h w ids, K codebook size, F features.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ar_tokenizers.image import metrics

from ar_unified.data.images import ImageCodec, resize
from ar_unified.data.sources import BadItem, Source
from ar_unified.evaluation.sheets import sheet
from ar_unified.language.document import ImagePart
from ar_unified.manifests import Json

PROTOCOL = {
    "version": 1,
    "resize": "largest centred window of the crop's proportions, scaled to the crop",
    "filter": "Lanczos (Pillow, reducing_gap 3)",
    "range": "uint8 RGB in and out: reconstructions are clipped and rounded, as in a PNG file",
    "means": "per image, then over images; psnr_of_mean_mse: of the mean error of the set; at most 100 dB",
    "ssim": "Gaussian window 11 x 11, sigma 1.5, mean of R, G and B",
}
CORRUPTION = (0.01, 0.05, 0.10)  # shares of the ids that are replaced
FIRST, WORST = 6, 2  # how many images are shown: the first ones, and the worst of the others
_SCAN = 16  # maximum number of items of a source that are tried for each needed image

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]  # uint8 [B, H, W, 3] twice -> float64 [B]
Extractor = Callable[[np.ndarray], np.ndarray]  # uint8 [B, H, W, 3] -> features [B, F]
Probe = Callable[[np.ndarray], Mapping[str, Json]]  # int32 [N, h, w] -> "bits_per_id" and the probe's "budget"


class NoReadableImage(ValueError):
    """The sources have no readable image."""


@dataclass(frozen=True)
class DrawnImage:
    """`pixels` are uint8 [H, W, 3] at the requested size; `enlarged` says whether the original was smaller."""

    source: str
    origin: str
    pixels: np.ndarray
    enlarged: bool


def draw_images(
    sources: Sequence[Source], size: tuple[int, int], limit: int, seed: int = 0, left_out: Counter[str] | None = None
) -> Iterator[DrawnImage]:
    """Up to `limit` different images at `size` (H, W), equally from every source, in a random order by `seed`.

    `left_out` counts bad items by kind; a repeated image counts as "repeated".
    """
    left_out = Counter() if left_out is None else left_out
    rng = np.random.default_rng(seed)
    walks = [_walk(source, rng.permutation(len(source))[: _SCAN * limit], size, left_out) for source in sources]
    seen = set[bytes]()
    for image in itertools.chain.from_iterable(itertools.zip_longest(*walks)):
        if image is None:  # this source has no more images
            continue
        digest = hashlib.sha256(image.pixels.tobytes()).digest()
        if digest in seen:
            left_out["repeated"] += 1
            continue
        seen.add(digest)
        yield image
        if len(seen) == limit:
            return


def evaluate_tokenizer(
    tokenizer: ImageCodec,
    sources: Sequence[Source],
    *,
    size: tuple[int, int],
    limit: int = 256,
    seed: int = 0,
    batch_size: int = 64,
    distances: Mapping[str, Distance] | None = None,
    extractors: Mapping[str, Extractor] | None = None,
    weights: Mapping[str, str] | None = None,
    probe: Probe | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> tuple[dict[str, Any], np.ndarray]:
    """Scores a tokenizer on the images of held-out documents.

    Args:
        size: (H, W) of the crops in pixels, which the tokenizer must divide into ids.
        limit: the maximum number of images, taken equally from every source.
        seed: the seed for the choice of images and for corrupted ids.
        batch_size: images in memory at a time. It changes no number, unless the tokenizer then rounds differently.
        distances: further distances by name, such as "LPIPS". The result has the mean of each under its name.
        extractors: networks by name. The Frechet distance between their features of real and of reconstructed images is
            rFID for "inception", and FD-<name> for any other.
        weights: the sha256 of the weight file of every distance and extractor.
        probe: a model of ids, trained on other images (`training.probe`).
        progress: called with the number of images of each batch that is done.

    Returns:
        (numbers, sheet). The sheet, uint8 [n * H, 3 * W, 3], is `sheets.sheet` of the images under "shown". The numbers
        are floats unless stated otherwise:
          protocol (PROTOCOL), crop [H, W], sources, images (int), seed, tokenizer (its sha256), skipped {reason: n},
          enlarged (int: the number of images smaller than the crop); all other numbers depend on these;
          psnr, psnr_of_mean_mse in dB; ssim; ms_ssim (crops below 161 pixels: ms_ssim_<n>_scales, or none); l1;
          codebook_size, ids_per_image, ids (int); usage, dead, perplexity, entropy_bits, normalised_entropy and
          top_percent of metrics.usage, over all ids of the set;
          bits_per_pixel with log2(K) bits per id; entropy_bits_per_pixel with entropy_bits per id;
          id_stability: the share of ids that are the same when the reconstruction is encoded;
          psnr_corrupted {"1%": ...}: PSNR in dB against the original if this share of ids is replaced at random;
          by_source {name: {images, psnr, ssim, l1, and the numbers of metrics.usage}};
          probe {bits_per_id, bits_per_pixel, ...}, the names of `distances`, rFID and FD-<name>, weights (if given);
          shown [{origin, psnr, ssim, worst}].

    Raises:
        NoReadableImage: if there is nothing to score.
        ValueError: if a distance or extractor has no sha256, or the tokenizer does not support the size.
    """
    distances, extractors, weights = dict(distances or {}), dict(extractors or {}), dict(weights or {})
    if unnamed := sorted((distances.keys() | extractors.keys()) - weights.keys()):
        raise ValueError(f"weights: expected a sha256 for each network's weight file, found none for {unnamed}")
    skipped = Counter[str]()
    tally = _Tally(tokenizer, _measures(size) | distances, extractors, seed)
    drawn = draw_images(sources, size, limit, seed, skipped)
    while batch := list(itertools.islice(drawn, batch_size)):
        tally.add(batch)
        progress(len(batch))
    if not tally.done:
        names = ", ".join(source.name for source in sources)
        raise NoReadableImage(f"no readable image in {names or 'an empty list of sources'}; left out: {dict(skipped)}")
    numbers: dict[str, object] = {
        "protocol": PROTOCOL,
        "crop": list(size),
        "sources": [source.name for source in sources],
        "images": len(tally.done),
        "enlarged": sum(image.enlarged for image in tally.done),
        "skipped": dict(skipped),
        "seed": seed,
        "tokenizer": tokenizer.hash,
        **tally.numbers(math.prod(size), probe),
    }
    if weights:
        numbers["weights"] = weights
    numbers["shown"] = tally.told()
    return numbers, sheet(np.stack([s.real for s in tally.shown]), np.stack([s.seen for s in tally.shown]))


class _Tally:
    """Collects a tokenizer's numbers on the images of a set, a batch at a time."""

    def __init__(
        self, tokenizer: ImageCodec, measures: Mapping[str, Distance], extractors: Mapping[str, Extractor], seed: int
    ) -> None:
        self.tokenizer, self.measures, self.extractors, self.seed = tokenizer, measures, extractors, seed
        self.done: list[DrawnImage] = []  # without their pixels
        self.shown: list[_Shown] = []
        self._ids: list[np.ndarray] = []
        self._stable = 0
        self._values: dict[str, list[float]] = {name: [] for name in (*measures, *map(_corrupted_name, CORRUPTION))}
        self._moments = {name: (_Moments(), _Moments()) for name in extractors}

    def add(self, batch: Sequence[DrawnImage]) -> None:
        first, K = len(self.done), self.tokenizer.codebook_size
        self.done += [replace(image, pixels=np.empty(0, np.uint8)) for image in batch]
        real = np.stack([image.pixels for image in batch])
        ids = self.tokenizer.encode(real)
        seen = self.tokenizer.decode(ids)
        self._ids.append(ids)
        self._stable += int(np.sum(self.tokenizer.encode(seen) == ids))
        for name, measure in self.measures.items():
            self._values[name] += measure(real, seen).tolist()
        for share in CORRUPTION:
            broken = np.stack([_corrupted(x, share, K, (self.seed, first + i)) for i, x in enumerate(ids)])
            self._values[_corrupted_name(share)] += metrics.psnr(real, self.tokenizer.decode(broken)).tolist()
        for name, extract in self.extractors.items():
            for moment, pixels in zip(self._moments[name], (real, seen), strict=True):
                moment.add(extract(pixels))
        psnr = self._values["psnr"]
        self.shown += [_Shown(first + i, psnr[first + i], real[i], seen[i]) for i in range(len(batch))]
        self.shown = _kept(self.shown)

    def numbers(self, pixels: int, probe: Probe | None) -> dict[str, Json]:
        """The numbers of `evaluate_tokenizer` that are computed from the images. Each image has `pixels` pixels."""
        ids, K = np.concatenate(self._ids), self.tokenizer.codebook_size
        measured = {name: np.array(found) for name, found in self._values.items()}
        of = np.array([image.source for image in self.done])
        codes, bits = _usage(ids, K), ids[0].size / pixels  # bits: factor from bits per id to bits per pixel
        numbers: dict[str, Json] = {
            **{name: float(measured[name].mean()) for name in self.measures if name != "mse"},
            "psnr_of_mean_mse": float(metrics.decibels(measured["mse"].mean())),
            "codebook_size": K,
            "ids_per_image": ids[0].size,
            "ids": ids.size,
            **codes,
            "bits_per_pixel": math.log2(K) * bits,
            "entropy_bits_per_pixel": codes["entropy_bits"] * bits,
            "id_stability": self._stable / ids.size,
            "psnr_corrupted": {f"{share:.0%}": float(measured[_corrupted_name(share)].mean()) for share in CORRUPTION},
            "by_source": {
                str(name): {
                    "images": int((of == name).sum()),
                    **{k: float(measured[k][of == name].mean()) for k in ("psnr", "ssim", "l1") if k in measured},
                    **_usage(ids[of == name], K),
                }
                for name in dict.fromkeys(of.tolist())
            },
        }
        if probe:
            found = dict(probe(ids))
            numbers["probe"] = found | {"bits_per_pixel": found["bits_per_id"] * bits}
        for name, (a, b) in self._moments.items():
            numbers["rFID" if name == "inception" else f"FD-{name}"] = _frechet(a, b)
        return numbers

    def told(self) -> list[dict[str, Json]]:
        """For each image that is shown: its origin, its scores, and whether it is shown as one of the worst."""
        return [
            {
                "origin": self.done[s.index].origin,
                **{key: float(self._values[key][s.index]) for key in ("psnr", "ssim") if key in self._values},
                "worst": s.index >= FIRST and len(self.done) > FIRST + WORST,
            }
            for s in self.shown
        ]


def _walk(source: Source, order: np.ndarray, size: tuple[int, int], left_out: Counter[str]) -> Iterator[DrawnImage]:
    for index in order:
        try:
            document = source[int(index)]
        except BadItem as error:
            left_out[error.kind] += 1
            continue
        for part in document.parts:
            if isinstance(part, ImagePart):
                enlarged = min(have / want for have, want in zip(part.pixels.shape, size, strict=False)) < 1
                yield DrawnImage(source.name, document.origin, resize(part.pixels, *size), enlarged)


# ---- distances -------------------------------------------------------------------------------------------------


def _measures(size: tuple[int, int]) -> dict[str, Distance]:
    """The distances that need no weights and that can be computed on images of this size."""
    found: dict[str, Distance] = {"psnr": metrics.psnr, "mse": metrics.mse, "l1": metrics.l1}
    most = len(metrics.SCALE_WEIGHTS)
    scales = [n for n in range(1, most + 1) if min(size) >= metrics.ms_ssim_side(n)]
    if scales:
        found["ssim"] = _one_by_one(metrics.ssim)
    if len(scales) > 1:
        name = "ms_ssim" if scales[-1] == most else f"ms_ssim_{scales[-1]}_scales"
        found[name] = _one_by_one(lambda a, b: metrics.ms_ssim(a, b, scales[-1]))
    return found


def _one_by_one(distance: Distance) -> Distance:
    """Computes one image at a time, because ten float64 copies of a whole batch would take too much memory."""
    return lambda a, b: np.array([distance(x, y) for x, y in zip(a, b, strict=True)])


class _Moments:
    """Mean and covariance of features, float64, over batches."""

    def __init__(self) -> None:
        self.count, self.total, self.products = 0, np.zeros(1), np.zeros((1, 1))

    def add(self, features: np.ndarray) -> None:
        features = np.asarray(features, np.float64)
        self.count += len(features)
        self.total = self.total + features.sum(0)
        self.products = self.products + features.T @ features

    def mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        mean = self.total / self.count
        return mean, (self.products - self.count * np.outer(mean, mean)) / max(self.count - 1, 1)


def _frechet(a: _Moments, b: _Moments) -> float:
    from ar_tokenizers.image.inception import frechet_distance  # this imports a network, so only when needed

    return float(frechet_distance(*a.mean_and_covariance(), *b.mean_and_covariance()))


# ---- ids -------------------------------------------------------------------------------------------------------


def _usage(ids: np.ndarray, codebook_size: int) -> dict[str, float]:
    return metrics.usage(np.bincount(ids.ravel(), minlength=codebook_size))


def _corrupted(ids: np.ndarray, share: float, codebook_size: int, seed: tuple[int, int]) -> np.ndarray:
    """Replaces each id of an image, int32 [h, w], by a random other id with probability `share`.

    All shares use the same random numbers, so an id that changes at 1 % also changes at 10 %.
    """
    rng = np.random.default_rng(seed)
    hit = rng.random(ids.shape) < share
    return np.where(hit, (ids + rng.integers(1, max(codebook_size, 2), ids.shape)) % codebook_size, ids).astype(
        np.int32
    )


def _corrupted_name(share: float) -> str:
    return f"psnr_corrupted/{share:.0%}"


# ---- what is shown ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shown:
    index: int
    psnr: float
    real: np.ndarray
    seen: np.ndarray


def _kept(shown: list[_Shown]) -> list[_Shown]:
    others = sorted((s for s in shown if s.index >= FIRST), key=lambda s: (s.psnr, s.index))
    return [s for s in shown if s.index < FIRST] + others[:WORST]
