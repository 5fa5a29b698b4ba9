"""Documents from TFDS datasets by name."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_info, read_only_builder
from tensorflow_datasets.proto import tf_example_pb2

from ar_unified.data import images, shapes  # importing `shapes` makes the embedded dataset known to TFDS
from ar_unified.data.items import BadItem
from ar_unified.data.sources.columns import PICTURES, Columns
from ar_unified.data.sources.records import Record, RecordSource, together
from ar_unified.errors import UserError

# The columns of datasets whose features have unusual names.
_COLUMNS = {
    "mnist": {"image": "image", "text": "label"},
    "cifar10": {"image": "image", "text": "label"},
    "coco_captions": {"image": "image", "text": "captions/text/0"},
    "wikipedia": {"text": "{title}\n\n{text}"},
    "ai2d": {"image": "image", "question": "{question}\n{options}", "answer": "options[answer]"},
}


class TfdsSource(RecordSource):
    """A TFDS dataset, given by its name. If the dataset is missing, it is built or downloaded first.

    The features' names, or `columns` (`Columns`), say which feature is which part of a document; the columns of a few
    datasets are built in. A class label becomes the name of its class. TensorFlow is never needed. If a dataset's own
    code needs TensorFlow, the dataset must be prepared already.

    Raises:
        UserError: if there is no such dataset, configuration or split, if it cannot be downloaded, or if its features
            make no document.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        *,
        columns: Mapping[str, str] | None = None,
        data_dir: str | None = None,
        label: str | None = None,
        reversible: bool = True,
        limits: images.Limits = images.LIMITS,
    ):
        with _about(name):
            builder = _builder(name, data_dir)
        features = builder.info.features
        chosen = Columns(columns or _COLUMNS.get(builder.name))
        if not hasattr(features, "items"):
            raise UserError(f"{name}: expected features with names, found {features}")
        used = chosen.names(list(features), name)
        super().__init__(chosen, None, label or name, reversible=reversible, limits=limits)
        # If images are not needed, their features are not even copied out of the records.
        unread = {feature for part in PICTURES for feature in used.get(part, ())}
        read = {feature: features[feature] for part in used.values() for feature in part if feature not in unread}
        with _about(name):
            self._examples = builder.as_data_source(split, deserialize_method=_RAW)
        self._whole = _reader(features)
        self._in_words = _reader(tfds.features.FeaturesDict(read))
        examples = sum(part.num_examples for part in builder.info.splits.values())
        self.together = together(builder.info.dataset_size / max(examples, 1))
        self._where = f"{builder.info.full_name}/{split}"
        self._has_language = "language" in used
        self.has_images = bool(unread or {"messages", "segments"} & used.keys())
        self.fingerprint: dict[str, object] = {"kind": "tfds", "items": len(self), "dataset": self._where} | (
            {"columns": dict(columns)} if columns else {}
        )

    def __len__(self) -> int:
        return len(self._examples)

    def origin(self, i: int) -> str:
        """The dataset, its split, and the number of the example."""
        return f"{self._where}:{i}"

    def language(self, i: int) -> str:
        """The language that the example states; "" if it states none."""
        return super().language(i) if self._has_language else ""

    def read(self, indices: Sequence[int], pictures: bool = True) -> list[Record | BadItem]:
        """Examples as records, read together. Without `pictures`, the records have no images."""
        reader = self._whole if pictures else self._in_words
        # Many are read at a time, because each read waits 0.4 ms for a thread.
        return [reader(data) for data in self._examples.__getitems__(indices)]


_RAW = tfds.decode.DeserializeMethod.RAW_BYTES


class _Reader:
    """Turns serialized examples of some features into records of Python values; images stay encoded bytes."""

    def __init__(self, features: Any):
        self._features = features
        self._decoders = {name: _raw_bytes() for name, feature in features.items() if _is_image(feature)}
        self._values = {name: _values(feature) for name, feature in features.items()}

    def __call__(self, data: bytes) -> Record:
        example = self._features.deserialize_example_np(data, decoders=self._decoders)
        return {name: self._values[name](value) for name, value in example.items()}


class _Direct:
    """Does the same as `_Reader`, with a tenth of the work, for features that are texts, images or lists of them."""

    def __init__(self, features: Mapping[str, object]):
        self._images = {name: _is_image(feature) for name, feature in features.items()}
        self._alone = {name: not hasattr(feature, "feature") for name, feature in features.items()}

    def __call__(self, data: bytes) -> Record:
        values = tf_example_pb2.Example.FromString(data).features.feature
        found: dict[str, object] = {}
        for name, image in self._images.items():
            each = list(values[name].bytes_list.value)
            each = each if image else _plain(each)
            found[name] = (each or [b"" if image else ""])[0] if self._alone[name] else each
        return found


def _reader(features: Any) -> _Reader | _Direct:
    kinds = {type(getattr(feature, "feature", feature)) for feature in features.values()}
    return _Direct(features) if kinds <= {tfds.features.Text, tfds.features.Image} else _Reader(features)


def _is_image(feature: Any) -> bool:
    return isinstance(getattr(feature, "feature", feature), tfds.features.Image)


def _values(feature: Any) -> Callable[[Any], object]:
    """Returns a function that turns a feature's values into Python values: numpy arrays into lists, bytes into texts,
    and class numbers into names.
    """
    if _is_image(feature):
        return lambda value: list(value) if isinstance(value, np.ndarray | list) else value
    inner = getattr(feature, "feature", None)
    if isinstance(inner, tfds.features.ClassLabel):
        return lambda value: [inner.int2str(int(each)) for each in value]
    if isinstance(inner, tfds.features.FeaturesDict):  # TFDS turns a list of objects into an object of lists
        return lambda value: _rows(_plain(value))
    if isinstance(feature, tfds.features.ClassLabel):
        return lambda value: feature.int2str(int(value)) if value >= 0 else None  # -1 is a secret label
    return _plain


def _builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """A builder for array_record. TFDS's default format, tfrecord, allows no random access and needs TensorFlow."""
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except ModuleNotFoundError:  # its code imports TensorFlow; a prepared dataset needs no code
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir, file_format="array_record")
    except (AssertionError, dataset_info.json_format.ParseError, json.JSONDecodeError) as error:
        folder = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser() / name.partition(":")[0]
        raise UserError(
            f"TFDS dataset {name!r}: expected its dataset_info.json and features.json below {folder}, found other or "
            f"damaged files ({type(error).__name__}): delete this folder to have the dataset made again"
        ) from error
    if not builder.data_path.exists():
        _prepare(builder)
    return builder


@contextlib.contextmanager
def _about(name: str) -> Iterator[None]:
    """Turns TFDS's errors about a name, a split or a download into a UserError, without the list of all datasets."""
    try:
        yield
    except (tfds.download.DownloadError, OSError, ValueError) as error:
        reason, *listed = [line.strip(" \t-") for line in str(error).splitlines() if line.strip()] or [repr(error)]
        reason = reason.replace(" Available datasets:", "")
        named = ", ".join(listed) if len(listed) <= 16 else ""
        raise UserError(f"TFDS dataset {name!r}: {reason} {named}".rstrip()) from error


def _prepare(builder: tfds.core.DatasetBuilder) -> None:
    """Builds or downloads a dataset, and prints which of the two it does."""
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()  # TFDS's progress bars fill a log file with thousands of lines
    info, where = builder.info, builder.data_dir
    if isinstance(builder, shapes.Shapes):
        counts = ", ".join(f"{count:,} {split}" for split, count in builder.counts().items())
        print(f"{info.full_name}: drawing {counts} examples into {where}; nothing is downloaded", flush=True)
    else:
        size = f"{info.download_size} to download" if info.download_size else "TFDS downloads what it needs"
        print(f"{info.full_name}: TFDS prepares this dataset in {where}; {size}", flush=True)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS would print "Downloading ... Unknown size" for both
        builder.download_and_prepare()


def _raw_bytes() -> Any:
    """A TFDS decoder that leaves images encoded, so that `images.decode` reads all images in the same way."""

    class RawBytes(tfds.decode.SkipDecoding):
        def decode_batch_example_np(self, example: Any) -> Any:  # TFDS 4.9 allows this only for single features
            return example

    return RawBytes()


def _rows(columns: Any) -> Any:
    """Turns an object of lists of equal length into a list of objects. Anything else is returned unchanged."""
    if not isinstance(columns, dict) or not all(isinstance(column, list) for column in columns.values()):
        return columns
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _plain(value: object) -> Any:
    """Turns numpy values and bytes into JSON values. Bytes that are not UTF-8 stay bytes."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    return [_plain(each) for each in value] if isinstance(value, list) else value
