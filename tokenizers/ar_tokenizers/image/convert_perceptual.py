"""Converts torch's published weights to the safetensors files that the perceptual losses and FID read.

    python -m ar_tokenizers.image.convert_perceptual --vgg vgg16.pth --lpips vgg.pth --output lpips.safetensors
    python -m ar_tokenizers.image.convert_perceptual --resnet50 resnet50.pth --output resnet50.safetensors
    python -m ar_tokenizers.image.convert_perceptual --inception pt_inception.pth --output inception.safetensors

The files are state dicts: torchvision's vgg16 and resnet50 (IMAGENET1K_V1, as the published recipes use), the heads of
the lpips package (weights/v0.1/vgg.pth), and pytorch-fid's Inception (pt_inception-2015-12-05). Arrays that the
networks do not use (classifiers, counters of batches) are left out; names and layout stay torch's. Only this module
imports torch.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save as save_tensors

from ar_tokenizers.files import write_bytes
from ar_tokenizers.image import inception, lpips, resnet
from ar_tokenizers.image.weights import Arrays, check_weights


def read_torch(path: str) -> Arrays:
    """The arrays of a state dict that torch.save wrote, float32. Raises ValueError if it contains anything else."""
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} is not a state dict (names and their tensors): save model.state_dict() instead")
    return {name: value.float().numpy() for name, value in state.items()}


def convert(paths: Sequence[str], shapes: Mapping[str, tuple[int, ...]], output: str | Path) -> str:
    """Writes the arrays that `shapes` names. Each of them must be in one of the state dicts. Returns the sha256 of the
    new file.

    Raises:
      ValueError: an array is missing or of another shape; nothing is written.
    """
    arrays: Arrays = {}
    for path in paths:
        arrays |= read_torch(path)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items() if name in shapes}
    check_weights(arrays, shapes, " and ".join(paths))
    data = save_tensors(arrays)
    write_bytes(output, data)
    return hashlib.sha256(data).hexdigest()


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads torch's files and writes one .safetensors with the arrays that losses and scores need."""
    parser = argparse.ArgumentParser(prog="python -m ar_tokenizers.image.convert_perceptual", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--vgg", metavar="FILE", help="torchvision's vgg16, for LPIPS")
    parser.add_argument("--lpips", metavar="FILE", help="the heads of LPIPS for VGG, version 0.1")
    parser.add_argument("--resnet50", metavar="FILE", help="torchvision's resnet50")
    parser.add_argument("--inception", metavar="FILE", help="pytorch-fid's Inception")
    parser.add_argument("--output", metavar="FILE", required=True, help="the .safetensors to write")
    given = parser.parse_args(arguments)
    networks = [
        ([given.vgg, given.lpips], lpips.SHAPES),
        ([given.resnet50], resnet.SHAPES),
        ([given.inception], inception.SHAPES),
    ]
    asked = [(files, shapes) for files, shapes in networks if any(files)]
    if len(asked) != 1 or not all(asked[0][0]) or Path(given.output).suffix != ".safetensors":
        parser.error(
            "give the files of one network (--vgg with --lpips, or --resnet50, or --inception) and an --output that "
            "ends in .safetensors"
        )
    files, shapes = asked[0]
    try:
        digest = convert(files, shapes, given.output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{given.output}: {len(shapes)} arrays, sha256 {digest}")


if __name__ == "__main__":
    main()
