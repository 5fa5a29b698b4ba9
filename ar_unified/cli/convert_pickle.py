"""Make .safetensors files of pickled checkpoints (.pth, .pt, .ckpt; LWM's VQGAN): nothing else here reads a pickle.

Needs no torch, and runs nothing that stands in a file: a pickle that names more than tensors need is refused by that
name. Of a folder every pickled file is converted, and settings and tokenizers beside them are copied, so that FOLDER is
what `ar-unified import` takes in its place. What is left out is said. Whole or not at all:
  NAME.safetensors    the tensors of NAME.pth, by the same names and in the same dtype
  NAME.other.json     what is no tensor but plain, as settings
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
