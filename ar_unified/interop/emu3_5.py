"""Emu3.5: Emu3's table of ids with more codes and other control tokens, Qwen3's transformer and IBQ's image tokenizer.

Sizes are written in decimal digits as text. <|extra_200|> is between rows, but not after the last row, and there
is no <|extra_201|>. An answer is between <|extra_100|> and <|extra_101|>.

Sources: baaivision/Emu3.5, src/tokenizer_emu3_ibq, configs/example_config_t2i.py, src/utils/input_utils.py. Emu3.5's
own class leaves out the QK-norm under attn_implementation="sdpa", but the weights need it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ar_unified.data.images import Resize
from ar_unified.errors import UserError
from ar_unified.interop import emu3, hf_config
from ar_unified.interop.files import Files
from ar_unified.interop.hf_config import Family
from ar_unified.interop.ids import Language, same_codes
from ar_unified.interop.images import Images, open_images
from ar_unified.interop.keys import HF
from ar_unified.interop.published import Published, check_tensors

EMU3_5 = Family(
    "Emu3",
    "Emu3ForCausalLM",
    {"qk_norm": "rmsnorm"},
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6, "head_dim": 128},
)
_MARKS = {
    "bss": "<|extra_100|>",
    "ess": "<|extra_101|>",
    "boc": "<|extra_50|>",
    "eoc": "<|extra_51|>",
    "bog": "<|extra_60|>",
    "eog": "<|extra_61|>",
}
_SIDE = 1024  # pixels along a side of a square that has the area of an image in the published configs
_LENGTH = 10240  # tokens of two images of this area, and of their text
# The published settings for generating one image from a text. Guidance is 5 for Emu3.5-Image, 2 for Emu3.5.
_SAMPLING = {
    "max_length": _LENGTH,
    "kv_dtype": "",
    "guidance": 2.0,
    "context": "empty_prompt",
    "text": {"temperature": 1.0, "top_k": 1024, "top_p": 0.9},
    "image": {"temperature": 1.0, "top_k": 5120, "top_p": 1.0},
}
_OF_IMAGES = 5.0


def language_of(names: Mapping[str, int], text: list[int], size: int, where: str, largest: tuple[int, int]) -> Language:
    """Emu3.5's ids. The arguments and errors are the same as in `emu3.language_of`."""
    return emu3.language_of(names, text, size, where, largest, "emu3_5", emu3.MARKS | _MARKS)


def open_emu3_5(files: Files) -> Published:
    """Opens Emu3.5; its transformer is a Qwen3. Raises UserError, which names the file, if something does not fit."""
    where = str(files.folder)
    if not any(name.endswith("self_attn.q_norm.weight") for name in files.source.names()):
        raise UserError(
            f"{where}: expected a tensor model.layers.0.self_attn.q_norm.weight, found none. For Emu3, give --as emu3"
        )
    model = hf_config.read(files.config, EMU3_5, where)
    images = _images(files)
    tokenizer = images.tokenizer
    largest = Resize("aspect", _SIDE, _SIDE, tokenizer.factor).largest
    grid = (largest[0] // tokenizer.factor, largest[1] // tokenizer.factor)
    ids = language_of(emu3.names_of(files), files.text_ids, model.vocab_size, str(files.text_file), files.size or grid)
    same_codes(ids, tokenizer.codebook_size, str(files.text_file))
    grammar = files.grammar(ids, tokenizer.hash)
    model = dataclasses.replace(model, vocab_size=grammar.vocabulary.size)
    guidance = _OF_IMAGES if "image" in files.folder.name.lower() else _SAMPLING["guidance"]
    return Published(
        system="emu3_5",
        keys=check_tensors(files.source, where, [HF], model, ids.border),
        source=files.source,
        grammar=grammar,
        text=grammar.text_codec,
        image=tokenizer,
        data={"image_size": [_SIDE, _SIDE], "resize": "aspect", "layout": "emu3_5", "max_tokens": _LENGTH},
        sampling=_SAMPLING | {"guidance": guidance},
        record={"system": "emu3_5", "form": "hf", **files.record()},
        notes=(*([tokenizer.no_decoder] if tokenizer.no_decoder else ()),),
    )


def _images(files: Files) -> Images:
    """IBQ's image tokenizer, from a file beside the model."""
    if files.image is None:
        raise UserError(
            f"{files.folder}: expected an image tokenizer, found none: convert the folder of Emu3.5-VisionTokenizer "
            "with `ar-unified convert-pickle`, and name the new folder with --image"
        )
    return open_images("ibq", files.image)
