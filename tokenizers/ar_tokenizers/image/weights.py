"""Reads pretrained weights from a file that the user names. Nothing is ever downloaded.

Files are safetensors or npz, with torch's names and layout ([O, I, h, w] kernels, separate batch norms), as
`convert_perceptual` writes them. Arrays are checked and converted to this package's layout, and batch norms are folded
into the convolution before them.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load as load_tensors

from ar_tokenizers.image.layers import Params

Arrays = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]
Padding = Literal["SAME", "VALID"] | int


def read_weights(path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Arrays, str]:
    """Reads a .safetensors or .npz file. Returns the arrays that `shapes` names, in float32, and the file's sha256.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is of another kind or damaged, or does not hold exactly the arrays named in `shapes`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weight file {path}; nothing is downloaded: name a file that you have")
    data = path.read_bytes()
    try:
        if path.suffix == ".safetensors":
            arrays = load_tensors(data)
        elif path.suffix == ".npz":
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        else:
            raise ValueError(
                "expected a .safetensors or .npz file; python -m ar_tokenizers.image.convert_perceptual converts .pth"
            )
    except Exception as error:  # each format has its own errors, and they do not name the file
        raise ValueError(f"{path} cannot be read as weights: {error}") from error
    check_weights(arrays, shapes, str(path))
    return {name: arrays[name].astype(np.float32) for name in shapes}, hashlib.sha256(data).hexdigest()


def check_file(path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises the errors of `read_weights`, but reads only the header of a .safetensors file; an .npz file is read
    whole.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        read_weights(path, shapes)
        return
    try:
        with safe_open(path, framework="numpy") as file:
            found = {name: _Header(tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{path} cannot be read as weights: {error}") from error
    check_weights(found, shapes, str(path))


class _Header(NamedTuple):
    shape: tuple[int, ...]


def check_weights(arrays: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], origin: str) -> None:
    """Raises ValueError if names or shapes differ from `shapes`. The message names the first few."""
    missing, extra = sorted(shapes.keys() - arrays.keys()), sorted(arrays.keys() - shapes.keys())
    wrong = [
        f"{name} is {tuple(arrays[name].shape)}, not {shapes[name]}"
        for name in sorted(shapes.keys() & arrays.keys())
        if tuple(arrays[name].shape) != shapes[name]
    ]
    found = [
        f"{len(names)} {what}, such as {', '.join(names[:3])}"
        for what, names in (("missing", missing), ("not expected", extra), ("of another shape", wrong))
        if names
    ]
    if found:
        raise ValueError(f"{origin}: expected exactly the {len(shapes)} arrays of this network; {'; '.join(found)}")


def conv_shapes(name: str, fan_in: int, fan_out: int, kernel: tuple[int, int], norm: str = "") -> Shapes:
    """Names and shapes of a convolution's arrays in a file: the kernel and the bias. If `norm` is given, the arrays of
    this batch norm replace the bias."""
    weight: Shapes = {f"{name}.weight": (fan_out, fan_in, *kernel)}
    if not norm:
        return weight | {f"{name}.bias": (fan_out,)}
    return weight | {f"{norm}.{part}": (fan_out,) for part in ("weight", "bias", "running_mean", "running_var")}


def conv_params(arrays: Mapping[str, np.ndarray], name: str, norm: str = "", epsilon: float = 1e-5) -> Params:
    """{"kernel" [h, w, I, O], "bias" [O]}, float32. The batch norm is folded in with float64 arithmetic and one
    rounding."""
    kernel = arrays[f"{name}.weight"].astype(np.float64)
    if norm:
        weight, bias, mean, variance = (
            arrays[f"{norm}.{part}"].astype(np.float64) for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / np.sqrt(variance + epsilon)
        kernel, offset = kernel * scale[:, None, None, None], bias - mean * scale
    else:
        offset = arrays[f"{name}.bias"]
    return {"kernel": np.float32(kernel.transpose(2, 3, 1, 0)), "bias": np.float32(offset)}


def conv(params: Params, x: jax.Array, stride: int = 1, padding: Padding = "SAME") -> jax.Array:
    """[B, h, w, I] -> [B, h', w', O] in the dtype of x. float32 products have full precision on every accelerator."""
    return jax.lax.conv_general_dilated(
        x,
        params["kernel"].astype(x.dtype),
        (stride, stride),
        [(padding, padding)] * 2 if isinstance(padding, int) else padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    ) + params["bias"].astype(x.dtype)


def max_pool(x: jax.Array, size: int, stride: int, padding: int = 0) -> jax.Array:
    """[B, h, w, F] -> [B, h', w', F]; the maximum ignores padding."""
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, size, size, 1), (1, stride, stride, 1), pads)
