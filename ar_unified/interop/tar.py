"""Tar: Qwen2.5 with the codes of TA-Tok, each a token with a name, <I0> to <I65535>.

A generated image begins with <im_start> and a scale, and ends with <im_end>. The scale <S0> is 27 x 27 codes, <S1> 13 x
13, <S2> 9 x 9; --size chooses one for all images. In the original, an image in a question has none of these marks; here
it has them. Tar's chat format is Qwen's (layouts.TurnFrames): <|im_start|>, the speaker, the turn, <|im_end|>. TA-Tok
(SigLIP2) and the models that turn its codes into pixels are not imported, so the model's images are codes alone.

Sources: csuhan/Tar, llava/model/llava_arch.py (names and their order), llava/data/dataset.py, t2i_inference.py (lengths
by scale, filter) and i2t_inference.py.
"""

from __future__ import annotations

import re

from ar_unified.errors import UserError
from ar_unified.interop import hf_config
from ar_unified.interop.files import Files
from ar_unified.interop.hf_config import QWEN2
from ar_unified.interop.ids import codes_of, language, named
from ar_unified.interop.published import Published
from ar_unified.interop.text import without_images
from ar_unified.language.syntax import ImageLayout

_CODE = re.compile(r"<I(\d+)>")
_SCALES = {27: "<S0>", 13: "<S1>", 9: "<S2>"}  # codes along a side of an image
_MARKS = {
    "bos": "<|endoftext|>",
    "eos": "<|im_end|>",
    "boi": "<im_start>",
    "eoi": "<im_end>",
    "turn": "<|im_start|>",
}
_PAD = "<|fim_pad|>"  # a token of Qwen2.5 that never occurs in its texts
_NOTES = (
    "The model's images are only codes: TA-Tok, which reads images, and the models that turn its codes into pixels are "
    "not imported.",
)


def open_tar(files: Files) -> Published:
    """Opens Tar, a Qwen2 whose images are codes alone. Raises UserError, which names the file, if something does not
    fit."""
    where = str(files.text_file)
    config = hf_config.read(files.config, QWEN2, str(files.folder))
    side = 27 if files.size is None else files.size[0]
    if side not in _SCALES or files.size not in (None, (side, side)):
        raise UserError(f"--size: expected {', '.join(f'{n}x{n}' for n in _SCALES)}; found {files.size}")
    codes = codes_of({int(match[1]): id for name, id in files.names.items() if (match := _CODE.fullmatch(name))}, where)
    marks = {name: named(files.names, token, where) for name, token in (_MARKS | {"scale": _SCALES[side]}).items()}
    marks |= {"pad": files.names[_PAD]} if _PAD in files.names else {}
    ids = language(config.vocab_size, files.text_ids, marks, ImageLayout("tar", side, side), codes=codes)
    image = {"temperature": 1.0, "top_k": 1200, "top_p": 0.95}
    return without_images(files, "tar", config, ids, *_NOTES, image=image)
