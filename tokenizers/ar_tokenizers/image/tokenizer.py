"""The trained image tokenizer: converts images to codes and back, and is saved in a folder."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from ar_tokenizers.files import write_bytes
from ar_tokenizers.image.autoencoder import NO_DECODER, Autoencoder, Params, shapes, to_float, to_uint8
from ar_tokenizers.image.config import AutoencoderConfig
from ar_tokenizers.image.tiling import map_windows

WEIGHTS, CONFIG, FORMAT = "weights.safetensors", "config.json", 2
PUBLISHED = "published.safetensors"
BATCH_SIZE = 64  # the default number of images in one call of the network


class ImageTokenizer:
    """Images uint8 [B, H, W, 3] <-> codes int32 [B, h, w] in [0, codebook_size).

    h is H/factor and w is W/factor x codes_per_position: see AutoencoderConfig.grid.

    Args:
      params: parameters as `init` makes them, without "decoder" if the tokenizer can read images but not draw them
        (`no_decoder`).
      batch_size: the number of images in one call of the compiled network; the last batch is padded. A fixed number
        means one compiled program per image size, and codes that do not depend on how many images are encoded together.
      published: for an imported tokenizer, the arrays of the published file that the network does not use, with their
        original names and dtypes. They are kept for an export, and are not part of the hash.

    Raises:
      ValueError: the parameters do not match the config; the message names one that does not.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        params: Params,
        *,
        batch_size: int = BATCH_SIZE,
        published: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        expected = _flatten(shapes(config))
        found = _flatten(params)
        if "decoder" not in params:
            expected = {name: leaf for name, leaf in expected.items() if not name.startswith("decoder.")}
        for name in sorted(expected.keys() | found.keys()):
            want, have = (getattr(leaves.get(name), "shape", "no such weight") for leaves in (expected, found))
            if want != have:
                raise ValueError(f"image tokenizer weight {name}: the config asks for {want}, found {have}")
        self.config, self.batch_size, self.published = config, batch_size, dict(published or {})
        self.params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
        self._encode = functools.partial(_encode, config)
        self._decode = functools.partial(_decode, config)

    @property
    def codebook_size(self) -> int:
        """The number of codes."""
        return self.config.codebook_size

    @property
    def no_decoder(self) -> str:
        """The reason why this tokenizer cannot draw images, and what to do; "" if it can."""
        return "" if "decoder" in self.params else NO_DECODER

    @property
    def factor(self) -> int:
        """Pixels along each side of one code."""
        return self.config.factor

    @property
    def codes_per_position(self) -> int:
        """The number of adjacent codes for one place in an image."""
        return self.config.codes_per_position

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of the config and of every weight. Equal tokenizers have equal hashes."""
        digest = hashlib.sha256(self.config.identity().encode())
        for name, leaf in sorted(_flatten(self.params).items()):
            digest.update(f"{name}{leaf.shape}".encode())
            digest.update(np.asarray(leaf).astype("<f4").tobytes())
        return digest.hexdigest()

    def on(self, device: jax.Device) -> ImageTokenizer:
        """The same tokenizer on the given device. Its programs are compiled again; its codes are the same."""
        params = jax.device_put(self.params, device)
        return ImageTokenizer(self.config, params, batch_size=self.batch_size, published=self.published)

    @functools.cached_property
    def single(self) -> ImageTokenizer:
        """The same tokenizer with batch size 1, for calls with one image: it does not pad the image to a larger batch.

        If two codes are equally near up to rounding, its choice may differ from the choice in a larger batch.
        """
        return ImageTokenizer(self.config, self.params, batch_size=1, published=self.published)

    def vectors(self) -> np.ndarray:
        """The quantizer's vector for each code, float32 [K, C]; similar codes have similar vectors
        (Quantizer.alone)."""
        return np.asarray(jax.jit(lambda params: Autoencoder.bind(self.config, params).quantizer.alone())(self.params))

    def encode(self, images: np.ndarray, *, tile: int = 0, overlap: int | None = None) -> np.ndarray:
        """Images to codes.

        Args:
          images: uint8 [B, H, W, 3].
          tile: if 0, the network sees whole images. Otherwise it sees windows of tile x tile pixels, `batch_size` at
            once, for any H and W.
          overlap: the least overlap of neighbouring windows, in pixels; by default a quarter of a tile. Tile and
            overlap are multiples of the factor. With backbone "space_to_depth" the result is the same as without
            windows if the overlap is 2 x `space_to_depth.receptive_radius(config)` (4 x in `decode`). With "vqgan" the
            norms and attention see one window only, so the codes differ from those of the whole image.

        Returns:
          int32 [B, h, w].

        Raises:
          ValueError: the dtype is wrong, sides or windows are not multiples of the factor, or windows overlap by more
            than half.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images must be uint8 [B, H, W, 3], got {images.dtype} {list(images.shape)}")
        self.config.grid(*images.shape[1:3])
        run = functools.partial(self._in_batches, self._encode, scales=(self.factor, 1), dtype=np.int32)
        return _in_grid(self._in_windows(run, images, (self.factor, 1), tile, overlap, blend=False))

    def decode(self, codes: np.ndarray, *, tile: int = 0, overlap: int | None = None) -> np.ndarray:
        """Codes to images: int32 [B, h, w] -> uint8 [B, H, W, 3].

        `tile` and `overlap` are as in `encode`, in pixels. Overlaps are blended, so no seam is visible.

        Raises:
          ValueError: a code is outside [0, codebook_size), windows are wrong as in `encode`, or there is no decoder.
        """
        if self.no_decoder:
            raise ValueError(self.no_decoder)
        codes, depth = np.asarray(codes), self.codes_per_position
        if not np.issubdtype(codes.dtype, np.integer) or codes.ndim != 3:
            raise ValueError(f"codes must be integers [B, h, w], got {codes.dtype} {list(codes.shape)}")
        if codes.size and not 0 <= codes.min() <= codes.max() < self.codebook_size:
            raise ValueError(f"codes must be in [0, {self.codebook_size}), found {codes.min()} to {codes.max()}")
        if codes.shape[2] % depth:
            raise ValueError(
                f"each position has {depth} codes, so the length of a row must be a multiple of {depth}, got "
                f"{codes.shape[2]}"
            )
        by_position = codes.astype(np.int32).reshape(*codes.shape[:2], codes.shape[2] // depth, depth)
        run = functools.partial(self._in_batches, self._decode, scales=(1, self.factor), dtype=np.uint8)
        return self._in_windows(run, by_position, (1, self.factor), tile, overlap, blend=True)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes weights.safetensors and then config.json. A folder without config.json holds no complete tokenizer.

        It also writes published.safetensors if the tokenizer has `published` arrays.
        """
        folder = Path(folder)
        for name in (CONFIG, PUBLISHED):
            (folder / name).unlink(missing_ok=True)
        write_bytes(folder / WEIGHTS, save_tensors({n: np.asarray(leaf) for n, leaf in _flatten(self.params).items()}))
        record = {"format": FORMAT, "hash": self.hash, "config": dataclasses.asdict(self.config)}
        if self.published:
            kept = save_tensors(self.published)
            write_bytes(folder / PUBLISHED, kept)
            record["published"] = hashlib.sha256(kept).hexdigest()
        write_bytes(folder / CONFIG, (json.dumps(record, indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, batch_size: int = BATCH_SIZE) -> ImageTokenizer:
        """Reads a folder that `save` wrote.

        Raises:
          FileNotFoundError: the folder has no (complete) tokenizer.
          ValueError: the weights do not belong to the config.
        """
        folder = Path(folder)
        config, record = _saved(folder)
        try:
            params = _unflatten(load_tensors((folder / WEIGHTS).read_bytes()))
        except SafetensorError as error:
            raise ValueError(f"{folder / WEIGHTS}: {error}: the file was changed, or cut short") from error
        published = _published(folder, record["published"]) if "published" in record else {}
        tokenizer = cls(config, params, batch_size=batch_size, published=published)
        if tokenizer.hash != record.get("hash"):
            raise ValueError(
                f"{folder}: {CONFIG} expects weights and settings with hash {record.get('hash')!s:.12}, but those in "
                f"the folder have hash {tokenizer.hash[:12]}: a file was changed or comes from another tokenizer"
            )
        return tokenizer

    def _in_windows(
        self,
        run: Callable[[np.ndarray], np.ndarray],
        rows: np.ndarray,
        scales: tuple[int, int],
        tile: int,
        overlap: int | None,
        *,
        blend: bool,
    ) -> np.ndarray:
        if not tile:
            return run(rows)
        overlap = tile // self.factor // 4 * self.factor if overlap is None else overlap
        if tile < self.factor or tile % self.factor or overlap % self.factor:
            raise ValueError(f"tile and overlap must be multiples of {self.factor} pixels, got {tile} and {overlap}")
        sides = dict(tile=tile // self.factor, overlap=overlap // self.factor)
        return map_windows(run, rows, scales=scales, **sides, blend=blend)

    def _in_batches(
        self, function: Callable[..., jax.Array], rows: np.ndarray, *, scales: tuple[int, int], dtype: type
    ) -> np.ndarray:
        """Encodes rows [n, H, W, 3] or decodes rows [n, h, w, codes_per_position], in batches of one size."""
        height, width = (side // scales[0] * scales[1] for side in rows.shape[1:3])
        shape = (height, width, 3 if dtype is np.uint8 else self.codes_per_position)
        out: np.ndarray = np.empty((len(rows), *shape), dtype)
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            padding = [(0, self.batch_size - len(batch)), *[(0, 0)] * (rows.ndim - 1)]
            made = np.asarray(function(self.params, np.pad(batch, padding))).reshape(-1, *shape)
            out[start : start + len(batch)] = made[: len(batch)]
        return out


# Compiled once per config, size and device. All tokenizers share the programs, because a training makes a tokenizer
# for each preview, and every stage loads its own.
@functools.partial(jax.jit, static_argnums=0)
def _encode(config: AutoencoderConfig, params: Params, rows: jax.Array) -> jax.Array:
    """uint8 [B, H, W, 3] -> int32 [B, h, w, codes_per_position]."""
    return Autoencoder.bind(config, params).encode(to_float(rows))


@functools.partial(jax.jit, static_argnums=0)
def _decode(config: AutoencoderConfig, params: Params, rows: jax.Array) -> jax.Array:
    """int32 [B, h, w, codes_per_position] -> uint8 [B, H, W, 3]."""
    return to_uint8(Autoencoder.bind(config, params).decode(_in_grid(rows)))


def saved_config(folder: str | os.PathLike[str]) -> AutoencoderConfig:
    """The config in a folder that `ImageTokenizer.save` wrote; reads no weights. Raises like `ImageTokenizer.load`."""
    return _saved(Path(folder))[0]


def _saved(folder: Path) -> tuple[AutoencoderConfig, dict[str, Any]]:
    """The config in config.json, and the whole content of that file."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no complete image tokenizer: the last file, {CONFIG}, is missing")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON: {error}. The file was changed or cut short") from error
    found = record.get("format") if isinstance(record, dict) else record
    if found != FORMAT:
        raise ValueError(f'{path}: "format": expected {FORMAT}, found {found!r:.40}')
    try:
        return AutoencoderConfig.from_dict(record["config"]), record
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: config: expected the settings of an image tokenizer: {error}") from error


def _published(folder: Path, digest: str) -> dict[str, np.ndarray]:
    """The `published` arrays. Raises ValueError if their file is missing or has changed since it was saved."""
    if not (folder / PUBLISHED).is_file():
        raise ValueError(f"{folder}: expected {PUBLISHED}, which {CONFIG} names; found none")
    kept = (folder / PUBLISHED).read_bytes()
    if hashlib.sha256(kept).hexdigest() != digest:
        raise ValueError(f"{folder / PUBLISHED}: the file was changed, or comes from another tokenizer")
    return load_tensors(kept)


def _in_grid(codes: Any) -> Any:
    """[B, h, w, codes_per_position] -> [B, h, w x codes_per_position]."""
    return codes.reshape(*codes.shape[:2], codes.shape[2] * codes.shape[3])


def _flatten(tree: Params, prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def _unflatten(leaves: dict[str, np.ndarray]) -> Params:
    tree: Params = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
