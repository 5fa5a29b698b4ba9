"""Documents from TFDS datasets by name."""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from ar_unified.data import images, shapes  # the second makes the embedded dataset known to TFDS
from ar_unified.data.items import BadItem
from ar_unified.errors import UserError
from ar_unified.language.document import Document, DocumentError, ImagePart, Part, TextPart


class TfdsSource:
    """A TFDS dataset by name, built or downloaded first where it is not there; never needs TensorFlow.

    The features say what an example is: image + (text | caption): a pair; image + question + answer: a question;
    texts + images: a story, text and image in turn; text alone: plain text. Everything else goes to `meta`.

    Raises:
        UserError: no such dataset, configuration or split, it cannot be downloaded, or its features are none of these.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        *,
        data_dir: str | None = None,
        label: str | None = None,
        reversible: bool = True,
        limits: images.Limits = images.LIMITS,
    ):
        with _about(name):
            # The default format, tfrecord, cannot be read at random, nor without TensorFlow.
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
            if not builder.data_path.exists():
                _prepare(builder)
        features = builder.info.features
        fitting = [kind for kind, keys in _FEATURES.items() if set(keys) <= features.keys()]
        if not fitting:
            expected = "; ".join(" + ".join(keys) for keys in _FEATURES.values())
            raise UserError(f"{name}: expected features {expected}; found {', '.join(features)}")
        self.kind = fitting[0]
        decoders = {
            key: _raw_bytes()
            for key, feature in features.items()
            if isinstance(getattr(feature, "feature", feature), tfds.features.Image)
        }
        with _about(name):
            self._examples = builder.as_data_source(split, decoders=decoders)
        self._where = f"{builder.info.full_name}/{split}"
        self.name, self.reversible, self.limits = label or name, reversible, limits
        self.fingerprint: dict[str, Any] = {"kind": "tfds", "items": len(self), "dataset": self._where}

    @property
    def has_images(self) -> bool:
        return self.kind != "text"

    def __len__(self) -> int:
        return len(self._examples)

    def origin(self, i: int) -> str:
        return f"{self._where}:{i}"

    def __getitem__(self, i: int) -> Document:
        example, origin = self._examples[i], self.origin(i)
        used = _FEATURES[self.kind]
        try:
            if self.kind == "story":
                turns = itertools.zip_longest(example["texts"], example["images"])
                pieces = [piece for turn in turns for piece in zip(used, turn, strict=True)]
            else:
                pieces = [(key, example[key]) for key in used]
            parts = tuple(self._part(key, value) for key, value in pieces if value is not None)
            meta = {key: _plain(value) for key, value in example.items() if key not in used}
            document = Document.of(parts, _PROMPTS[self.kind], id=origin, origin=origin, meta=meta)
            document.check()
        except UnicodeDecodeError as error:
            raise BadItem("bad_utf8", origin, str(error)) from error
        except (images.ImageError, DocumentError) as error:
            raise BadItem(error.kind, origin, str(error)) from error
        return document

    def _part(self, key: str, value: Any) -> Part:
        if key in ("image", "images"):
            return ImagePart(images.decode(value, self.limits))
        return TextPart(_string(value))

    def texts(self, i: int) -> list[str]:
        example = self._examples[i]
        keys = [key for key in _FEATURES[self.kind] if key not in ("image", "images")]
        values = itertools.chain.from_iterable(example[k] if k == "texts" else [example[k]] for k in keys)
        try:
            return [_string(value) for value in values]
        except UnicodeDecodeError as error:
            raise BadItem("bad_utf8", self.origin(i), str(error)) from error

    def language(self, i: int) -> str:
        """The feature "language", "" where there is none."""
        return _string(self._examples[i].get("language", ""))


# Features in the order of the document's parts; the first that an example has all of decides.
_FEATURES = {
    "question": ("image", "question", "answer"),
    "pair": ("text", "image"),
    "caption": ("caption", "image"),
    "story": ("texts", "images"),
    "text": ("text",),
}
_PROMPTS = {"question": 2, "pair": 1, "caption": 1, "story": None, "text": None}


@contextlib.contextmanager
def _about(name: str) -> Iterator[None]:
    """Turns what TFDS raises for a name, a split or a download into a UserError, without its list of all datasets."""
    try:
        yield
    except (tfds.download.DownloadError, OSError, ValueError) as error:
        reason, *listed = [line.strip(" \t-") for line in str(error).splitlines() if line.strip()] or [repr(error)]
        reason = reason.replace(" Available datasets:", "")
        named = ", ".join(listed) if len(listed) <= 16 else ""
        raise UserError(f"TFDS dataset {name!r}: {reason} {named}".rstrip()) from error


def _prepare(builder: tfds.core.DatasetBuilder) -> None:
    """Builds or downloads a dataset, and says which."""
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()  # its bars fill a log file with thousands of lines
    info, where = builder.info, builder.data_dir
    if isinstance(builder, shapes.Shapes):
        counts = ", ".join(f"{count:,} {split}" for split, count in builder.counts().items())
        print(f"{info.full_name}: drawn here, nothing is downloaded: {counts}, into {where}", flush=True)
    else:
        size = f", {info.download_size} to download" if info.download_size else ", which downloads what it needs"
        print(f"{info.full_name}: prepared by TFDS{size}, into {where}", flush=True)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS would say "Downloading ... Unknown size" of both
        builder.download_and_prepare()


def _raw_bytes() -> Any:
    """A TFDS decoder that leaves images as the bytes they are, so that `images.decode` reads all images alike."""

    class RawBytes(tfds.decode.SkipDecoding):
        def decode_batch_example_np(self, example: Any) -> Any:  # TFDS 4.9 has it for single features only
            return example

    return RawBytes()


def _string(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _plain(value: Any) -> Any:
    """numpy and bytes as JSON values."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list) else value
