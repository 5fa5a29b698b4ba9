"""Make .safetensors files of pickled checkpoints (.pth, .pt, .ckpt; LWM's VQGAN): nothing else here reads a pickle.

Needs no torch, and runs nothing from a file: a pickle that names anything but what tensors need is refused, and the
message has that name. In a folder, every pickled file is converted, and settings and tokenizers beside them are copied;
`ar-unified import` takes the result in place of the original. Files that are left out are named. Leaves, whole or not
at all:
  NAME.safetensors    the tensors of NAME.pth, by the same names and in the same dtype
  NAME.other.json     plain values that are no tensors, such as settings
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ar_unified.errors import UserError
from ar_unified.interop.conversion import convert


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Converts and prints a line for each file; returns the exit status. Raises UserError."""
    if overrides:
        raise UserError(f"{overrides[0]}: this verb has no config")
    convert(arguments.source, arguments.output, say=lambda line: print(line, flush=True))
    return 0
