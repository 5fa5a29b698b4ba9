"""Emu3 (Stage1, Gen, Chat), with the tensor names of its own repository or of transformers' port.

The table of ids has Qwen's text tokens, then 208 special tokens and the codes. Sizes are written in decimal digits as
text. <|extra_200|> ends a row, <|extra_201|> ends the image; <|extra_203|> and <|extra_204|> begin and end a document.

Chat's prompt is the turns of a conversation. The prompt of Gen and Stage1 is plain text, followed by words that ask for
quality. The tensors and tables of all three have the same form. Two keys of config.json tell Chat from the others;
without those keys, --as says which model it is.

Sources: baaivision/Emu3, tokenization_emu3.py, processing_emu3.py and image_generation.py; transformers' Emu3.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from ar_tokenizers.image.published import dialect_in

from ar_unified.data.images import Resize
from ar_unified.errors import UserError, about
from ar_unified.interop import hf_config
from ar_unified.interop.files import Files
from ar_unified.interop.hf_config import Family
from ar_unified.interop.ids import Language, codes_of, language, named, same_codes
from ar_unified.interop.images import Images, open_images, read_images
from ar_unified.interop.keys import HF
from ar_unified.interop.published import Published, check_tensors
from ar_unified.language.syntax import ImageLayout
from ar_unified.manifests import Json

EMU3 = Family("Emu3", "Emu3ForCausalLM", defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6})
MARKS = {
    "pad": "<|endoftext|>",
    "bos": "<|extra_203|>",
    "eos": "<|extra_204|>",
    "boi": "<|image start|>",
    "eoi": "<|image end|>",
    "img": "<|image token|>",
    "eol": "<|extra_200|>",
    "eof": "<|extra_201|>",
    "frame": "<|extra_202|>",
}
_EXTRAS = 205
_CODE = re.compile(r"<\|visual token (\d+)\|>")
_VQ = ("vqmodel.", "model.vqmodel.")
# How the prefixes of tensors' names differ from the original ones, for each of three forms: the original, the files of
# transformers' port, and the port in memory.
_PORTS: tuple[dict[str, str], ...] = (
    {},
    {"model.": "text_model.model.", "lm_head.": "text_model.lm_head."},
    {"model.": "model.text_model."},
)
# Values of these keys in config.json show the kind, gen or chat; _LAYOUTS has the layout that each kind was trained
# with.
_TOLD = {
    "image_area": {518400: "gen", 262144: "chat"},
    "max_position_embeddings": {9216: "gen", 131072: "chat"},
}
_LAYOUTS = {"chat": "emu3", "gen": "emu3_gen"}
_SIDE = 720  # pixels along a side of a square that has the area of Emu3-Gen's training images
# The published settings for generating images (image_generation.py).
_SAMPLING = {
    "max_length": 10240,
    "kv_dtype": "",
    "guidance": 3.0,
    "context": "negative_prompt",
    "negative_prompt": "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, "
    "cropped, worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry.",
    "text": {"temperature": 1.0, "top_k": 1024, "top_p": 0.9},
    "image": {"temperature": 1.0, "top_k": 2048, "top_p": 1.0},
}
_PRAISE = " masterpiece, film grained, best quality."


def names_of(files: Files) -> Mapping[str, int]:
    """The published id of each special token by its name. A tiktoken file has only text tokens; the special tokens
    follow them."""
    if files.names:
        return files.names
    size = files.codec.size
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(_EXTRAS))]
    path = files.find("emu3_vision_tokens.txt", folder=files.text_file.parent)
    with about(str(path)):
        names += path.read_text(encoding="utf-8").split("\n")[:-1]
    return {name: size + number for number, name in enumerate(names)}


def language_of(
    names: Mapping[str, int],
    text: list[int],
    size: int,
    where: str,
    largest: tuple[int, int],
    kind: str = "emu3",
    controls: Mapping[str, str] = MARKS,
) -> Language:
    """Emu3's ids.

    Args:
        names: published id of every special token.
        text: published ids that stand for text.
        size: number of ids, V.
        largest: height and width of an image in codes.
        kind: the layout's kind.
        controls: for each control token of the layout, by our name, its published name.

    Raises UserError for names that are missing or stand for wrong ids.
    """
    codes = codes_of({int(match[1]): id for name, id in names.items() if (match := _CODE.fullmatch(name))}, where)
    marks = {control: named(names, name, where) for control, name in controls.items()}
    return language(size, text, marks, ImageLayout(kind, *largest), codes=codes)


def kind_of(config: Mapping[str, Json], text_config: Mapping[str, Json], where: str) -> str:
    """The kind that a config.json says, gen or chat. Raises UserError if it says neither or both."""
    said = {key: value for key in _TOLD if (value := {**text_config, **config}.get(key)) is not None}
    found = {_TOLD[key].get(value, "") if type(value) is int else "" for key, value in said.items()}
    if len(found) != 1 or not all(found):
        expected = ", or ".join(
            f"{key} {' or '.join(f'{value} ({kind})' for value, kind in told.items())}" for key, told in _TOLD.items()
        )
        raise UserError(
            f"{where}/config.json: expected {expected}; found {said or 'neither'}. Give --as emu3_gen for "
            "Emu3-Gen or Stage1, --as emu3_chat for Emu3-Chat"
        )
    return found.pop()


def open_chat(files: Files) -> Published:
    """Opens Emu3-Chat, whatever config.json says. Raises like `open_emu3`."""
    return open_emu3(files, "chat")


def open_gen(files: Files) -> Published:
    """Opens Emu3-Gen or Stage1, whatever config.json says. Raises like `open_emu3`."""
    return open_emu3(files, "gen")


def open_emu3(files: Files, kind: str = "") -> Published:
    """Opens Emu3 as BAAI publishes it, or in transformers' form. `kind` is gen or chat; "" means the kind
    that config.json says. Raises UserError, which names the file, if something does not fit.
    """
    where = str(files.folder)
    config = files.config.get("text_config", files.config)
    if not isinstance(config, Mapping):
        raise UserError(f"{where}/config.json: text_config: expected keys and values, found {config!r:.80}")
    if "head_dim" in files.config and "text_config" not in files.config:
        raise UserError(f"{where}/config.json: head_dim: expected none, as in Emu3. For Emu3.5, give --as emu3_5")
    kind = kind or kind_of(files.config, config, where)
    layout = _LAYOUTS[kind]
    model = hf_config.read(config, EMU3, where)
    images, inside = _images(files), files.image is None
    tokenizer = images.tokenizer
    largest = Resize("aspect", _SIDE, _SIDE, tokenizer.factor).largest
    grid = (largest[0] // tokenizer.factor, largest[1] // tokenizer.factor)
    said = str(files.text_file)
    ids = language_of(names_of(files), files.text_ids, model.vocab_size, said, files.size or grid, layout)
    same_codes(ids, tokenizer.codebook_size, str(files.text_file))
    grammar = files.grammar(ids, tokenizer.hash)
    model = dataclasses.replace(model, vocab_size=grammar.vocabulary.size)
    dialects = [HF.prefixed(port) for port in _PORTS]
    keys = check_tensors(files.source, where, dialects, model, ids.border, aside=_VQ if inside else ())
    dropout = config.get("attention_dropout")
    return Published(
        system="emu3",
        keys=keys,
        source=files.source,
        grammar=grammar,
        text=grammar.text_codec,
        image=tokenizer,
        data={"image_size": [_SIDE, _SIDE], "resize": "aspect", "layout": layout, "max_tokens": 10240},
        sampling=_SAMPLING | {"prompt_suffix": _PRAISE if kind == "gen" else ""},
        record={
            "system": "emu3",
            "form": "hf",
            "prefixes": _PORTS[[each.names for each in dialects].index(keys.dialect.names)],
            **(images.record if inside else {}),
            **files.record(),
        },
        notes=(f"The config asks for attention dropout {dropout}, which training here does not have.",) * bool(dropout),
    )


def _images(files: Files) -> Images:
    """The vision tokenizer from a file beside the model, or from inside the file of transformers' port."""
    if files.image is not None:
        return open_images("emu3_vq", files.image)
    if not any(name.startswith(_VQ) for name in files.source.names()):
        raise UserError(
            f"{files.folder}: expected an image tokenizer, found none: name the folder of Emu3-VisionTokenizer "
            "with --image"
        )
    settings = files.config.get("vq_config", {})
    with about(str(files.folder)):
        dialect, prefix = dialect_in("emu3_vq", files.source.names())
    return read_images("emu3_vq", settings, files.source, dialect, str(files.folder), prefix)
