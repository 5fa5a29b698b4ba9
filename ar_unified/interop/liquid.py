"""Liquid: Gemma with image codes after its own ids, and the images of Chameleon's VQGAN.

<unused0> and <unused1> begin and end an image. <unused2> stands for the empty prompt. The id of code 0 follows the last
of Gemma's ids.

Sources: FoundationVision/Liquid, liquid/train/train.py and evaluation/inference_t2i.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ar_unified.errors import UserError
from ar_unified.interop import hf_config
from ar_unified.interop.chameleon import vqgan_of
from ar_unified.interop.files import Files
from ar_unified.interop.hf_config import GEMMA
from ar_unified.interop.ids import Language, language, named, same_codes
from ar_unified.interop.keys import HF
from ar_unified.interop.published import Published, check_tensors
from ar_unified.language.syntax import ImageLayout

_MARKS = {
    "pad": "<pad>",
    "bos": "<bos>",
    "eos": "<eos>",
    "boi": "<unused0>",
    "eoi": "<unused1>",
    "unconditional": "<unused2>",
}
_LENGTH = 2048
_SAMPLING = {
    "max_length": _LENGTH,
    "kv_dtype": "",
    "guidance": 7.0,
    "context": "empty_prompt",
    "text": {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    "image": {"temperature": 0.99, "top_k": 4096, "top_p": 0.96},
}


def language_of(names: Mapping[str, int], text: list[int], size: int, where: str, grid: tuple[int, int]) -> Language:
    """Liquid's ids.

    Args:
        names: published id of every token of Gemma.
        text: published ids that stand for text.
        size: number of ids, V.
        grid: height and width of each image in codes.

    Raises UserError for missing names, and for a table without ids after the named ones.
    """
    marks = {control: named(names, name, where) for control, name in _MARKS.items()}
    first = max(names.values()) + 1
    if first >= size:
        raise UserError(
            f"{where}: expected image codes after id {first - 1}, the last named token; found only {size} ids"
        )
    return language(size, text, marks, ImageLayout("liquid", *grid), codes=range(first, size))


def open_liquid(files: Files) -> Published:
    """Opens Liquid, a Gemma with Chameleon's image tokenizer. Raises UserError, which names the file, if something does
    not fit."""
    where = str(files.folder)
    model = hf_config.read(files.config, GEMMA, where)
    images = vqgan_of(files, {})
    tokenizer = images.tokenizer
    grid = files.size or images.grid
    ids = language_of(files.names, files.text_ids, model.vocab_size, str(files.text_file), grid)
    same_codes(ids, tokenizer.codebook_size, str(files.text_file))
    grammar = files.grammar(ids, tokenizer.hash)
    model = dataclasses.replace(model, vocab_size=grammar.vocabulary.size)
    scale = (
        f"Token vectors are multiplied by {model.embedding_scale:.4f}, the square root of {model.d_model}. "
        "The model was trained in bfloat16, which rounds this number."
    )
    return Published(
        system="liquid",
        keys=check_tensors(files.source, where, [HF], model, ids.border),
        source=files.source,
        grammar=grammar,
        text=grammar.text_codec,
        image=tokenizer,
        data={
            "image_size": [side * tokenizer.factor for side in grid],
            "resize": "crop",
            "layout": "liquid",
            "max_tokens": _LENGTH,
        },
        sampling=_SAMPLING,
        record={"system": "liquid", "form": "hf", **files.record()},
        notes=(scale, *([tokenizer.no_decoder] if tokenizer.no_decoder else ())),
    )
