"""Make .safetensors files from pickled checkpoints (.pth, .pt, .ckpt; LWM's VQGAN). No other verb reads a pickle.

Needs no torch, and runs nothing from a file. A pickle is refused if it names something that tensors do not need; the
message shows this name. In a folder, every pickled file is converted, and the settings and tokenizers next to them are
copied, so that `ar-unified import` can take the new folder in place of the original. Files that are left out are named.
Writes, whole or not at all:
  NAME.safetensors    the tensors of NAME.pth, with the same names and dtypes
  NAME.other.json     plain values that are not tensors, such as settings
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ar_unified.errors import UserError
from ar_unified.interop.conversion import convert


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Converts and prints a line for each file; returns the exit status. Raises UserError."""
    if overrides:
        raise UserError(f"{overrides[0]} does nothing with convert-pickle, which reads no config: leave it out")
    convert(arguments.source, arguments.output, say=lambda line: print(line, flush=True))
    return 0
