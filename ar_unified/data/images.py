"""Decodes image files to uint8 RGB and resizes them for a model. An image is decoded only after its header was checked.

`decode` reads image files; `to_rgb` converts images that Pillow has opened. `colours` says how each kind of pixel is
converted.

Axes: `H` `W` height and width in pixels.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ar_unified.data.colours import AnyImage, ImageError, in_rgb
from ar_unified.data.encoding import no_content
from ar_unified.data.resampling import Resample, scaled
from ar_unified.errors import UserError

# Formats that Pillow reads by itself. Formats that need another program (EPS) or are hardly tested are left out.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# The endings of their files' names, in lower case.
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip

_MOST_FRAMES = 10_000


@dataclass(frozen=True)
class Limits:
    """Limits for an image. Its header is checked first, so a decompression bomb is never decoded.

    Attributes:
        pixels: maximum number of pixels (2**26 is 8192 x 8192, 192 MiB decoded).
        aspect: largest ratio of the longer side to the shorter side.
    """

    pixels: int = 2**26
    aspect: float = 20.0

    def check(self, height: int, width: int) -> None:
        """Raises ImageError ("image_shape") if an image of this size is outside the limits."""
        found = f"{height} x {width} pixels (height x width)"
        if min(height, width) < 1 or height * width > self.pixels:
            raise ImageError("image_shape", f"expected 1 to {self.pixels} pixels, found {found}")
        if max(height, width) > self.aspect * min(height, width):
            raise ImageError(
                "image_shape", f"expected a longer side of at most {self.aspect:g} times the shorter, found {found}"
            )


LIMITS = Limits()


def decode(data: bytes, limits: Limits = LIMITS, resize: Resize | None = None) -> np.ndarray:
    """An image file as read-only uint8 [H, W, 3]: see `colours`.

    resize: how the decoded image is resized. Resizing here avoids two copies of the whole image (a tenth of the
        time), and lets the decoder of a JPEG do a part of the resizing.

    Raises:
        ImageError: "empty_file" (no bytes), "image_shape" (outside `limits`), "unreadable_image" (no image of
            FORMATS, truncated or broken, or values of unknown range).
    """
    with _opened(data, limits) as image:
        whole = resize.shrink(image) if resize else None
        found = in_rgb(image)
        pixels = resize(found, whole) if resize else _pixels(found)
    pixels.flags.writeable = False  # sources may return the same array several times
    return pixels


def frames(data: bytes, most: int, limits: Limits = LIMITS) -> list[np.ndarray]:
    """At most `most` images of an animation, evenly spaced (`evenly`), each uint8 [H, W, 3]. Raises ImageError."""
    with _opened(data, limits) as image:
        count = getattr(image, "n_frames", 1)
        if count > _MOST_FRAMES:
            raise ImageError("image_shape", f"expected at most {_MOST_FRAMES} frames, found {count}")
        if image.format == "GIF" and not data.rstrip(b"\0\r\n").endswith(b";"):  # cut short; Pillow would not notice
            raise ImageError("unreadable_image", "the animation is cut short: a GIF ends with ';'")
        shown = []
        for number in evenly(count, most):
            image.seek(number)
            shown.append(to_rgb(image.copy()))
    return shown


def evenly(count: int, most: int) -> list[int]:
    """Evenly spaced numbers from 0 to count - 1, at most `most` of them. If `most` is 1, the only number is 0."""
    chosen = min(count, most)
    return [round(i * (count - 1) / max(chosen - 1, 1)) for i in range(chosen)]


@contextmanager
def _opened(data: bytes, limits: Limits) -> Iterator[Image.Image]:
    if not data:
        raise ImageError("empty_file", "the file has no bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            limits.check(image.height, image.width)
            yield image
    except (ImageError, UserError, MemoryError):  # without memory, a good image cannot be decoded
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("image_shape", f"expected at most {limits.pixels} pixels: {error}") from error
    except UnidentifiedImageError:  # Pillow's text would show an address in memory
        found = no_content(data) or f"bytes that begin with {data[:8]!r}"
        kind = " of a kind that Pillow reads" if data[:4] in (b"II*\0", b"MM\0*") else ""
        raise ImageError("unreadable_image", f"expected an image{kind} ({', '.join(FORMATS)}), found {found}") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise ImageError("unreadable_image", f"{type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """An image that Pillow has opened or made, as uint8 [H, W, 3]: see `colours`. Raises ImageError."""
    return _pixels(in_rgb(image))


def _pixels(image: AnyImage) -> np.ndarray:
    return image if isinstance(image, np.ndarray) else np.array(image)


def to_png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def to_thumbnail(pixels: np.ndarray, side: int) -> bytes:
    """uint8 [H, W, 3] as the bytes of a JPEG file, scaled so that its longer side has at most `side` pixels."""
    file, image = io.BytesIO(), Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


# ---- sizes -------------------------------------------------------------------------------------------------------


class Cells(Protocol):
    """How codes cover an image: `codes_per_position` neighbouring codes stand for `factor` x `factor` pixels."""

    @property
    def factor(self) -> int:
        """The side, in pixels, of the square that one position covers."""

    @property
    def codes_per_position(self) -> int:
        """How many codes one position of an image has. They are neighbours in a row of codes."""


class ImageCodec(Cells, Protocol):
    """The interface of a trained image tokenizer, such as `ar_tokenizers.image.tokenizer.ImageTokenizer`."""

    @property
    def codebook_size(self) -> int:
        """The number of codes, K."""

    @property
    def hash(self) -> str:
        """sha256 of everything that decides which codes an image gets."""

    def encode(self, images: np.ndarray, /) -> np.ndarray:
        """uint8 [B, H, W, 3] -> int32 [B, h, w] in [0, K)."""

    def decode(self, codes: np.ndarray, /) -> np.ndarray:
        """int32 [B, h, w] -> uint8 [B, H, W, 3]."""


def for_single(codec: ImageCodec) -> ImageCodec:
    """The tokenizer to use for calls with a single image. Most image tokenizers pad each call to a full batch, so one
    image takes as long as a whole batch.
    """
    return getattr(codec, "single", codec)


class NoImages:
    """Takes the place of the image tokenizer in a model of text alone. It has no codes, and refuses every image."""

    codebook_size, factor, codes_per_position, hash = 0, 1, 1, ""

    def encode(self, images: np.ndarray, /) -> np.ndarray:
        """Raises UserError, because there is no image tokenizer."""
        raise UserError("expected text alone, found an image: this model has no image tokenizer")

    decode = encode


class CodesAlone(NoImages):
    """Takes the place of an image tokenizer that is not available. Images enter and leave the model as codes.

    Where the size of an image is needed in pixels, one code counts as one pixel.
    """

    no_decoder = (
        "this model's images are only codes, because its image tokenizer cannot be imported: give images to the model "
        "as CodesPart; `Model.generate` returns images as codes"
    )

    def __init__(self, codebook_size: int):
        self.codebook_size = codebook_size

    def encode(self, images: np.ndarray, /) -> np.ndarray:
        """Raises UserError, because there is no image tokenizer to encode pixels."""
        raise UserError(self.no_decoder)

    decode = encode


def draws_none(tokenizer: ImageCodec) -> str:
    """The reason why a tokenizer cannot decode codes to images, and what to do; "" if it can. A tokenizer from a file
    may have no decoder.

    Call it before sampling, because a model should not sample codes that cannot be decoded.
    """
    return getattr(tokenizer, "no_decoder", "")


def by_size(function: Callable[[np.ndarray], np.ndarray], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Calls `function` once for all arrays of the same shape; returns the results in the order of the arrays."""
    rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, array in enumerate(arrays):
        rows[array.shape].append(i)
    out: list[np.ndarray] = list(arrays)
    for where in rows.values():
        for i, result in zip(where, function(np.stack([arrays[i] for i in where])), strict=True):
            out[i] = result
    return out


RESIZES = ("crop", "aspect")
Decoding = Literal["full", "reduced"]
WAY = ("resample", "decoding")  # these say how an image is resized; the other fields say to which size
_GAP = {"full": 3.0, "reduced": 2.0}  # shrinking by whole factors leaves at least this multiple of the target's sides
_SCALES = (8, 4, 2)  # the numbers by which a JPEG's decoder can divide the sides


@dataclass(frozen=True)
class Resize:
    """How to resize images of any size to sizes that a tokenizer and a layout accept.

    Attributes:
        kind: "crop" takes the largest centred window of the target's aspect and scales it to exactly height x width.
            "aspect" scales to about height * width pixels and keeps the image's own aspect, as nearly as sides that are
            multiples of `factor` allow (as in Emu3 and Lumina-mGPT). A centred crop removes what does not fit.
        height, width: size of the target in pixels, multiples of `factor`.
        factor: side of one code in pixels.
        max_height, max_width: largest sides with "aspect", in pixels; 0 means twice the target's sides.
        resample: the filter; see `resampling`. If an image is made smaller, the filter is wider.
        decoding: "full" decodes all pixels. If an image has 6 times the target's sides or more, blocks of pixels are
            averaged before the filter. "reduced" first shrinks an image of 4 times the target's sides or more, but
            leaves at least twice the target's sides. The decoder of a JPEG divides its sides by 2, 4 or 8; the sides of
            other images are divided by any whole number.
    """

    kind: Literal["crop", "aspect"]
    height: int
    width: int
    factor: int = 1
    max_height: int = 0
    max_width: int = 0
    resample: Resample = "lanczos"
    decoding: Decoding = "full"

    def __post_init__(self) -> None:
        for name, known in (("kind", RESIZES), ("resample", get_args(Resample)), ("decoding", get_args(Decoding))):
            if (found := getattr(self, name)) not in known:
                raise UserError(f"resize: expected {name} {' or '.join(map(repr, known))}, found {found!r}")
        for name in ("height", "width"):
            side = getattr(self, name)
            if side < self.factor or side % self.factor:
                raise UserError(f"resize: expected {name} to be a multiple of the factor {self.factor}, found {side}")

    @property
    def largest(self) -> tuple[int, int]:
        """The largest height and width in pixels that an image gets. ("aspect" fixes the area, not the sides.)"""
        return self.max_height or 2 * self.height, self.max_width or 2 * self.width

    @property
    def way(self) -> dict[str, str]:
        """The fields `resample` and `decoding`, each only if it differs from its default. Old records have neither."""
        known = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: found for name in WAY if (found := getattr(self, name)) != known[name]}

    def record(self) -> dict[str, Any]:
        """Everything that decides the pixels, as JSON values."""
        return {name: found for name, found in dataclasses.asdict(self).items() if name not in WAY} | self.way

    def target(self, height: int, width: int) -> tuple[int, int]:
        """The height and width to which an image of height x width pixels is resized."""
        if self.kind == "crop":
            return self.height, self.width
        scale = math.sqrt(self.height * self.width / (height * width))
        sides = (round(side * scale / self.factor) for side in (height, width))
        h, w = (min(max(n, 1), m // self.factor) * self.factor for n, m in zip(sides, self.largest, strict=True))
        return h, w

    def shrink(self, image: Image.Image) -> tuple[int, int] | None:
        """Tells the decoder of a JPEG by how much it may divide the sides. The image is open but not decoded yet.

        Returns the original height and width of the upright image; None if it is no JPEG or `decoding` is "full".
        """
        if self.decoding != "reduced" or image.format not in ("JPEG", "MPO"):
            return None
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        whole = (image.width, image.height) if orientation in range(5, 9) else (image.height, image.width)
        times = min(side / wanted for side, wanted in zip(whole, self.target(*whole), strict=True))
        for scale in _SCALES:
            # If `scale` does not divide a side, the last pixel of this side is incomplete. It must still be the last
            # pixel when the image is upright.
            exact = orientation == 1 or not any(side % scale for side in whole)
            if exact and times >= _GAP[self.decoding] * scale:
                image.draft(image.mode, (image.width // scale, image.height // scale))
                break
        return whole

    def __call__(self, image: AnyImage, whole: tuple[int, int] | None = None) -> np.ndarray:
        """uint8 [H, W, 3] -> uint8 [*target(H, W), 3]. An array that already has this size is returned unchanged.

        whole: height and width before the decoder made the image smaller; None if it did not.
        """
        whole = whole or sides_of(image)
        return resize(image, *self.target(*whole), self.resample, _GAP[self.decoding], whole)


def resize(
    image: AnyImage,
    height: int,
    width: int,
    resample: Resample = "lanczos",
    gap: float = _GAP["full"],
    whole: tuple[int, int] | None = None,
) -> np.ndarray:
    """Cuts out the largest centred window that has the aspect ratio of height x width, and scales it to uint8 [height,
    width, 3].

    gap: a large image is first shrunk by whole factors, to at least `gap` times height and width.
    whole: as in `Resize.__call__`.
    """
    h, w = whole or sides_of(image)
    if sides_of(image) == (height, width):
        return _pixels(image)
    scale = min(h / height, w / width)
    # Rounding may give a value just below 0. It becomes 0, because Pillow refuses a box that begins outside.
    top, left = max((h - height * scale) / 2, 0.0), max((w - width * scale) / 2, 0.0)
    box = (left, top, min(left + width * scale, w), min(top + height * scale, h))
    if (h, w) != sides_of(image):
        times = round(h / sides_of(image)[0])
        left, top, right, bottom = (side / times for side in box)
        box = (left, top, right, bottom)
    whole_image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return scaled(whole_image, height, width, box, resample, gap)


def sides_of(image: AnyImage) -> tuple[int, int]:
    """The height and width of an image in pixels."""
    return image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)


def recoloured(pixels: np.ndarray, draw: Sequence[float]) -> np.ndarray:
    """Changes the colours of an image at random: channels are permuted, and each gets its own tone curve.

    White and black do not change, and nearly white stays nearly white. uint8 [H, W, 3] -> the same shape.

    draw: four numbers in [0, 1). The first chooses one of the six orders of the channels. Each of the others chooses
    the exponent of one channel's curve, from 1/2 to 2.
    """
    orders = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    exponents = 4.0 ** (np.asarray(draw[1:]) - 0.5)
    curves = np.rint(255 * (np.arange(256)[:, None] / 255) ** exponents).astype(np.uint8)
    return curves[pixels[..., orders[int(draw[0] * 6)]], np.arange(3)]
