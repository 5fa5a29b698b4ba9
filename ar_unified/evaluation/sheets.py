"""Shows an image tokenizer's metrics, and its reconstructions next to the originals, as a PNG and as HTML."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import numpy as np

from ar_unified.data.images import resize
from ar_unified.evaluation.charts import number
from ar_unified.evaluation.figures import figure
from ar_unified.manifests import Json

AMPLIFIED = 4  # the absolute difference is shown times this, so an error of 64 levels becomes white
SHOWN = 256  # maximum side of an image on the page, in pixels; the PNG has images of full size


def sheet(real: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Makes a sheet, uint8 [n * H, 3 * W, 3], from two arrays uint8 [n, H, W, 3], with a row for each image.

    A row is: original | reconstruction | their absolute difference times AMPLIFIED.
    """
    difference = np.abs(real.astype(np.int16) - seen)
    columns = (real, seen, np.minimum(AMPLIFIED * difference, 255).astype(np.uint8))
    return np.concatenate(columns, axis=2).reshape(-1, 3 * real.shape[2], 3)


def section(results: Mapping[str, Mapping[str, Json]], sheets: Mapping[str, np.ndarray]) -> str:
    """HTML with the numbers of `evaluation.tokenizer` for each set, the data that they were measured on, and the sheets
    of the sets.
    """
    if not results:
        return ""
    images = ""
    for name, numbers in results.items():
        cards = "".join(_cards(sheets[name], numbers)) if name in sheets else ""
        if cards:
            images += f'<h3>{escape(name.replace("_", " "))}</h3><div class="stories">{cards}</div>'
    note = (
        f"The first images, without selection; then the worst of the others. Differences are shown {AMPLIFIED} "
        f"times as large as they are."
    )
    return _table(results) + (f'<p class="lead">{note}</p>{images}' if images else "") + _sources(results)


def _cards(sheet: np.ndarray, numbers: Mapping[str, Any]) -> list[str]:
    H, W = numbers["crop"]
    scale = min(1.0, SHOWN / max(H, W))
    size = max(1, round(H * scale)), max(1, round(W * scale))
    cards = []
    for row, facts in zip(sheet.reshape(-1, H, 3, W, 3), numbers["shown"], strict=True):
        real, seen, difference = (resize(np.ascontiguousarray(row[:, i]), *size) for i in range(3))
        psnr = f"{facts['psnr']:.1f} dB"
        told = "worst: " if facts["worst"] else ""
        told += f"SSIM {facts['ssim']:.3f}, " if "ssim" in facts else ""
        origin = escape(facts["origin"].rpartition("/")[2])
        cards.append(
            f'<div class="card sample"><div class="triple">{figure(real, "original")}'
            f"{figure(seen, psnr)}{figure(difference, f'difference x {AMPLIFIED}')}</div>"
            f'<div class="text soft">{told}{origin}</div></div>'
        )
    return cards


# ---- numbers ---------------------------------------------------------------------------------------------------


def _decibels(value: float) -> str:
    return f"{value:.2f} dB"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _fine(value: float) -> str:
    return f"{value:.4f}"


def _count(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")


# (path in the result, name, format); numbers that networks measure follow after these
_ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("images", "Images", _count),
    ("psnr", "PSNR, mean over images", _decibels),
    ("psnr_of_mean_mse", "PSNR of the mean error", _decibels),
    ("ssim", "SSIM", _fine),
    ("ms_ssim", "MS-SSIM", _fine),
    *((f"ms_ssim_{n}_scales", f"MS-SSIM, {n} scales of 5", _fine) for n in (4, 3, 2)),
    ("l1", "L1, of values in 0..1", _fine),
    ("usage", "Codes used", _share),
    ("dead", "Codes never used", _count),
    ("perplexity", "Perplexity, codes", number),
    ("entropy_bits", "Entropy, bits per id", _fine),
    ("normalised_entropy", "Entropy, share of log2(K)", _share),
    ("top_percent", "Ids among the most used 1 % of codes", _share),
    ("bits_per_pixel", "Bits per pixel, log2(K) per id", _fine),
    ("entropy_bits_per_pixel", "Bits per pixel, entropy", _fine),
    ("probe/bits_per_id", "Bits per id under a small transformer", _fine),
    ("probe/bits_per_pixel", "Bits per pixel under that transformer", _fine),
    ("id_stability", "Ids unchanged when encoded again", _share),
    ("psnr_corrupted/1%", "PSNR with 1 % of ids at random", _decibels),
    ("psnr_corrupted/5%", "PSNR with 5 % of ids at random", _decibels),
    ("psnr_corrupted/10%", "PSNR with 10 % of ids at random", _decibels),
)


def _table(results: Mapping[str, Mapping[str, Any]]) -> str:
    rows = ""
    known = _ROWS + tuple((name, _network(name, results), _fine) for name in _networks(results))
    for path, label, write in known:
        values = [_at(numbers, path) for numbers in results.values()]
        if any(value is not None for value in values):
            cells = "".join(f"<td>{'' if value is None else write(value)}</td>" for value in values)
            rows += f"<tr><td>{label}</td>{cells}</tr>"
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in results)
    told = "".join(f"<p>{_protocol(name, numbers)}</p>" for name, numbers in results.items())
    probes = [numbers["probe"] for numbers in results.values() if "probe" in numbers]
    if probes:
        budget = "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in probes[0]["budget"].items())
        told += f"<p>The small transformer: {escape(budget)}.</p>"
    return (
        f'<div class="card scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<details><summary>What was measured</summary><div class="soft">{told}</div></details>'
    )


def _protocol(name: str, numbers: Mapping[str, Any]) -> str:
    H, W = numbers["crop"]
    said = [
        f"{name.replace('_', ' ')}: {numbers['images']} images of {', '.join(numbers['sources'])}, crops of "
        f"{H} x {W} pixels as {numbers['ids_per_image']} ids of {numbers['codebook_size']} codes",
        *(f"{key}: {value}" for key, value in numbers["protocol"].items()),
        f"tokenizer {numbers['tokenizer'][:12]}",
    ]
    if numbers["enlarged"]:
        said.append(f"{numbers['enlarged']} images were smaller than the crop and were enlarged")
    said += [f"left out: {n} {reason.replace('_', ' ')}" for reason, n in numbers["skipped"].items()]
    return escape("; ".join(said) + ".")


def _sources(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of the sets that have several sources, with a row for each source."""
    columns = ("images", "psnr", "ssim", "usage", "perplexity", "entropy_bits")
    formats = {path: (label, write) for path, label, write in _ROWS}
    rows = ""
    for name, numbers in results.items():
        if len(numbers["by_source"]) > 1:
            for source, found in numbers["by_source"].items():
                cells = "".join(f"<td>{formats[key][1](found[key]) if key in found else ''}</td>" for key in columns)
                rows += f"<tr><td>{escape(name.replace('_', ' '))}: {escape(source)}</td>{cells}</tr>"
    if not rows:
        return ""
    head = "".join(f"<th>{formats[key][0]}</th>" for key in columns)
    return (
        f'<h3>by source</h3><div class="card scroll"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _at(numbers: Mapping[str, Json], path: str) -> float | None:
    value: object = numbers
    for key in path.split("/"):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, (int, float)) else None


def _networks(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The names of the numbers that networks measure."""
    named = [
        key
        for numbers in results.values()
        for key in numbers
        if key in numbers.get("weights", {}) or key == "rFID" or key.startswith("FD-")
    ]
    return list(dict.fromkeys(named))


def _network(name: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    file = "inception" if name == "rFID" else name.removeprefix("FD-")
    digests = {numbers["weights"][file] for numbers in results.values() if file in numbers.get("weights", {})}
    return f"{escape(name)} <small>weights {escape(', '.join(digest[:12] for digest in sorted(digests)))}</small>"
