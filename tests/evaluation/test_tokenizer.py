"""The protocol's scores of a tokenizer with known mistakes."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ar_tokenizers.image import metrics

from ar_unified.data.images import resize
from ar_unified.data.sources import BadItem
from ar_unified.evaluation.sheets import AMPLIFIED
from ar_unified.evaluation.tokenizer import (
    FIRST,
    WORST,
    NoReadableImage,
    _corrupted,
    draw_images,
    evaluate_tokenizer,
)
from ar_unified.language.document import Document, ImagePart, TextPart

SIZE, K = (48, 64), 8


class Greys:
    """Each code is one of 8 greys for 4 x 4 pixels. Decoded images are lighter by `drift` levels."""

    codebook_size, hash = K, "5" * 64

    def __init__(self, drift: int = 0) -> None:
        self.drift, self.calls = drift, 0

    def encode(self, images: np.ndarray) -> np.ndarray:
        self.calls += 1
        B, H, W, _ = images.shape
        means = images.reshape(B, H // 4, 4, W // 4, 4, 3).mean((2, 4, 5))
        return np.clip(np.round((means - 16) / 32), 0, K - 1).astype(np.int32)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        greys = np.clip(codes * 32 + 16 + self.drift, 0, 255).astype(np.uint8)
        return np.repeat(greys.repeat(4, 1).repeat(4, 2)[..., None], 3, -1)


class Album:
    """A source of documents; None is a bad item."""

    def __init__(self, name: str, images: Any) -> None:
        self.name, self._images = name, list(images)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: Any) -> Document:
        pixels = self._images[i]
        if pixels is None:
            raise BadItem("unreadable_image", f"{self.name}:{i}", "cut in half")
        return Document.of((TextPart("a"), ImagePart(pixels)), 1, origin=f"{self.name}:{i}")


def exact(count: int, codes: int = K, seed: int = 0) -> list[np.ndarray]:
    """Images of the first `codes` codes, which Greys reconstructs exactly."""
    drawn = np.random.default_rng(seed).integers(0, codes, (count, SIZE[0] // 4, SIZE[1] // 4))
    return list(Greys().decode(drawn))


def noisy(count: int, seed: int = 0) -> list[np.ndarray]:
    """Images of twice the size with increasing noise."""
    rng = np.random.default_rng(seed)
    clean = np.stack(exact(count, seed=seed)).repeat(2, 1).repeat(2, 2).astype(np.float64)
    return list(
        np.clip(clean + rng.normal(0, 1, clean.shape) * np.arange(count)[:, None, None, None] * 6, 0, 255).astype(
            np.uint8
        )
    )


def test_a_perfect_tokenizer_and_every_number_of_its_ids():
    sources = [Album("all", exact(4)), Album("two codes", exact(4, codes=2, seed=1))]
    found, _ = evaluate_tokenizer(Greys(), sources, size=SIZE)
    assert (found["images"], found["crop"], found["sources"]) == (8, [48, 64], ["all", "two codes"])
    assert (found["psnr"], found["psnr_of_mean_mse"], found["l1"], found["id_stability"]) == (100, 100, 0, 1)
    assert found["ssim"] == found["ms_ssim_3_scales"] == 1 and "ms_ssim" not in found
    assert (found["ids_per_image"], found["ids"], found["usage"], found["dead"]) == (12 * 16, 8 * 12 * 16, 1, 0)
    assert found["bits_per_pixel"] == 3 / 16 and found["by_source"]["all"]["images"] == 4
    assert found["entropy_bits_per_pixel"] == pytest.approx(found["entropy_bits"] / 16)
    assert found["by_source"]["two codes"]["dead"] == 6 and found["by_source"]["two codes"]["entropy_bits"] < 1.01
    assert 2 < found["entropy_bits"] < 3  # half of the images have only two greys
    noise = list(found["psnr_corrupted"].items())
    assert [share for share, _ in noise] == ["1%", "5%", "10%"]
    assert 100 > noise[0][1] > noise[1][1] > noise[2][1] > 10


def test_means_are_over_images_of_what_a_png_file_holds():
    images = noisy(6)
    found, _ = evaluate_tokenizer(Greys(), [Album("noise", images)], size=SIZE)
    real = np.stack([resize(image, *SIZE) for image in images])
    seen = Greys().decode(Greys().encode(real))
    assert found["psnr"] == pytest.approx(metrics.psnr(real, seen).mean())
    assert found["psnr_of_mean_mse"] == pytest.approx(float(metrics.decibels(metrics.mse(real, seen).mean())))
    assert found["psnr_of_mean_mse"] < found["psnr"]
    assert found["ssim"] == pytest.approx(metrics.ssim(real, seen).mean())
    assert found["ms_ssim_3_scales"] == pytest.approx(metrics.ms_ssim(real, seen, 3).mean())
    assert found["l1"] == pytest.approx(metrics.l1(real, seen).mean())


def test_batches_change_nothing_and_the_seed_draws():
    sources = [Album("a", noisy(5)), Album("b", noisy(9, seed=1))]
    found, sheet = evaluate_tokenizer(Greys(drift=5), sources, size=SIZE, limit=9, batch_size=9)
    again, same = evaluate_tokenizer(Greys(drift=5), sources, size=SIZE, limit=9, batch_size=2)
    np.testing.assert_array_equal(sheet, same)
    assert str(found) == str(again)
    assert {name: part["images"] for name, part in found["by_source"].items()} == {"a": 4, "b": 5} or {"a": 5, "b": 4}
    other, _ = evaluate_tokenizer(Greys(drift=5), sources, size=SIZE, limit=9, seed=1)
    assert other["shown"] != found["shown"]


def test_ids_that_do_not_survive_are_counted():
    stable, _ = evaluate_tokenizer(Greys(drift=15), [Album("a", exact(3))], size=SIZE)
    unstable, _ = evaluate_tokenizer(
        Greys(drift=17), [Album("a", exact(3))], size=SIZE
    )  # each grey but the last becomes the next lighter one
    last = np.mean(Greys().encode(np.stack(exact(3))) == K - 1)
    assert stable["id_stability"] == 1 and unstable["id_stability"] == pytest.approx(last)


def test_what_is_left_out_is_said():
    small = exact(1)[0][:24, :32]
    source = Album("mixed", [*exact(3), None, exact(1)[0], small])
    found, _ = evaluate_tokenizer(Greys(), [source], size=SIZE)
    assert found["skipped"] == {"unreadable_image": 1, "repeated": 1}
    assert found["images"] == 4 and found["enlarged"] == 1
    with pytest.raises(NoReadableImage, match="no readable image in mixed.*unreadable_image"):
        evaluate_tokenizer(Greys(), [Album("mixed", [None])], size=SIZE)
    assert len(list(draw_images([source], SIZE, 2))) == 2


def test_corruption_replaces_its_share_by_other_ids():
    ids = np.random.default_rng(0).integers(0, K, (100, 100)).astype(np.int32)
    changed = {share: _corrupted(ids, share, K, (0, 7)) != ids for share in (0.0, 0.05, 0.1, 1.0)}
    assert not changed[0.0].any() and changed[1.0].all()  # no id is replaced by itself
    assert changed[0.05].mean() == pytest.approx(0.05, abs=0.01) and changed[0.1].mean() == pytest.approx(0.1, abs=0.01)
    assert np.all(changed[0.1][changed[0.05]])
    assert _corrupted(ids, 1.0, K, (0, 7)).dtype == np.int32 and _corrupted(ids, 1.0, K, (0, 7)).max() < K


def test_the_first_images_and_the_worst_of_the_others_are_shown():
    images = noisy(FIRST + WORST + 5)
    found, sheet = evaluate_tokenizer(Greys(), [Album("a", images)], size=SIZE, batch_size=3)
    assert [row["worst"] for row in found["shown"]] == [False] * FIRST + [True] * WORST
    H, W = SIZE
    rows = sheet.reshape(-1, H, 3, W, 3).swapaxes(1, 2)  # [n, 3, H, W, 3]
    for (real, seen, difference), told in zip(rows, found["shown"], strict=True):
        np.testing.assert_array_equal(real, resize(images[int(told["origin"].partition(":")[2])], *SIZE))
        assert told["psnr"] == pytest.approx(float(metrics.psnr(real, seen)))
        np.testing.assert_array_equal(difference, np.minimum(AMPLIFIED * np.abs(real.astype(int) - seen), 255))
    drawn = [image.origin for image in draw_images([Album("a", images)], SIZE, 99)]
    numbers = {origin: int(origin.partition(":")[2]) for origin in drawn}  # later images are noisier
    assert [row["origin"] for row in found["shown"][:FIRST]] == drawn[:FIRST]
    worst = sorted(drawn[FIRST:], key=lambda origin: -numbers[origin])[:WORST]
    assert [row["origin"] for row in found["shown"][FIRST:]] == worst


def test_networks_need_their_hash_and_only_inception_makes_an_fid(monkeypatch):
    given = []

    def frechet_distance(*moments: np.ndarray) -> float:
        given.append(moments)
        return float(np.sum((moments[0] - moments[2]) ** 2))

    monkeypatch.setitem(
        sys.modules, "ar_tokenizers.image.inception", SimpleNamespace(frechet_distance=frechet_distance)
    )
    features = lambda pixels: pixels[:, :2, 0].astype(np.float32).mean(1)  # noqa: E731
    source = Album("a", exact(6))
    networks = dict(
        distances={"LPIPS": lambda a, b: np.abs(a.astype(float) - b).mean((1, 2, 3))},
        extractors={"inception": features, "mine": features},
    )
    digests = {"LPIPS": "1" * 64, "inception": "2" * 64, "mine": "3" * 64}
    found, _ = evaluate_tokenizer(Greys(drift=3), [source], size=SIZE, weights=digests, batch_size=4, **networks)
    assert found["LPIPS"] == pytest.approx(3) and found["weights"] == digests
    assert found["rFID"] == found["FD-mine"] == pytest.approx(27) and "FD-inception" not in found
    real = features(np.stack([p.pixels for p in draw_images([source], SIZE, 6)])).astype(np.float64)
    np.testing.assert_allclose(given[0][0], real.mean(0))
    np.testing.assert_allclose(given[0][1], np.cov(real, rowvar=False))
    with pytest.raises(ValueError, match=r"sha256 .* none for \['mine'\]"):
        evaluate_tokenizer(Greys(), [source], size=SIZE, weights={"LPIPS": "1", "inception": "2"}, **networks)


def test_a_probe_is_asked_about_the_held_out_ids():
    asked = []

    def probe(ids: np.ndarray) -> dict[str, Any]:
        asked.append(ids)
        return {"bits_per_id": 1.5, "budget": {"steps": 3}}

    images = exact(3)
    found, _ = evaluate_tokenizer(Greys(), [Album("a", images)], size=SIZE, probe=probe)
    assert found["probe"] == {"bits_per_id": 1.5, "bits_per_pixel": 1.5 / 16, "budget": {"steps": 3}}
    assert asked[0].shape == (3, 12, 16) and math.prod(SIZE) / asked[0][0].size == 16
