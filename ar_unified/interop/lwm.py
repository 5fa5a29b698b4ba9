"""LWM: a transformer over two tables of ids, text and images. Here they are one table, in which the images' ids follow
the text's.

The table of images has 8,448 ids: 8,192 codes, then 8192, which ends a frame, 8193, which ends a clip, and ids that are
never written. The texts "<vision>" and "</vision>" surround an image. In training each table had its own softmax over
all of its ids. The softmax of text includes <unk>, <s> and </s>; the softmax of images includes 8192, 8193 and the ids
that are never written. A bundle has the same two softmaxes (`loss.softmax`, `Layout.image_side`). The ids of each table
are consecutive in a bundle; `Published.record["tables"]` has the tables' lengths.

No file beside the weights describes the model. The number of heads follows from the size, if the model is a published
one, or from a config.json. RoPE's base follows from the name of the folder, from a config.json or from --rope-theta.

Sources: LargeWorldModel/LWM, lwm/llama.py (LLAMA_STANDARD_CONFIGS), vision_llama.py, data.py, train.py (its loss) and
vision_generation.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ar_unified.errors import UserError
from ar_unified.interop import hf_config
from ar_unified.interop.files import Files
from ar_unified.interop.hf_config import LLAMA
from ar_unified.interop.ids import PLAIN, Language, language, named
from ar_unified.interop.images import Images, open_images
from ar_unified.interop.keys import LWM, LWM_TEXT
from ar_unified.interop.published import Published, check_tensors
from ar_unified.interop.sources import Source, read_json
from ar_unified.interop.streams import Stream
from ar_unified.language.syntax import ImageLayout
from ar_unified.manifests import Json
from ar_unified.model.config import TransformerConfig

THETAS = {"128K": 1e7, "256K": 1e7, "512K": 2.5e7, "1M": 5e7}
_NAMED = re.compile(r"lwm.*?(128k|256k|512k|1m)\b", re.IGNORECASE)
_HEADS = {(4096, 32): 32}  # heads by width and number of layers; only the 7B was published
SIDE, PIXELS = 16, 256
_MARKS = {"pad": "<unk>", "bos": "<s>", "eos": "</s>"}
_LENGTH = 4096
_SAMPLING = {
    "max_length": _LENGTH,
    "kv_dtype": "",
    "guidance": 5.0,
    "context": "bos_boi",
    "text": {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    "image": {"temperature": 1.0, "top_k": 8192, "top_p": 1.0},
}


def language_of(
    names: Mapping[str, int], text: list[int], tables: tuple[int, ...], codebook: int, where: str
) -> Language:
    """LWM's ids.

    Args:
        names: published id of every piece of the text tokenizer.
        text: published ids that stand for text.
        tables: the number of text ids and the number of image ids; for a model of text alone, only the first.
        codebook: the number of image codes.

    Raises UserError for missing names, a text id without a piece, or a table of images that is too small.
    """
    marks = {control: named(names, name, where) for control, name in _MARKS.items()}
    if len(tables) == 1:
        return language(tables[0], text, marks, PLAIN)
    first, images = tables
    if images < codebook + 2:
        raise UserError(
            f"{where}: expected at least {codebook} + 2 ids in the table of images (the codes, the end of a frame and "
            f"the end of a clip), found {images}"
        )
    if missing := sorted(set(range(first)) - {*text, *marks.values()}):
        raise UserError(f"{where}: expected a piece for each of {first} ids of text, found none for id {missing[0]}")
    marks |= {"eof": first + codebook, "eov": first + codebook + 1}
    return language(sum(tables), text, marks, ImageLayout("lwm", SIDE, SIDE), codes=range(first, first + codebook))


def theta_of(folder: Path, told: Mapping[str, Any], given: float | None) -> float:
    """RoPE's base, from the first of these that has it: `given`, a config.json, the name of a published model.

    Raises UserError if nothing says it, because a wrong base gives wrong numbers that look right.
    """
    if given is not None:
        return given
    for key in ("rope_theta", "theta"):
        if type(told.get(key)) in (int, float):
            return float(told[key])
    for part in reversed(folder.resolve().parts):
        if match := _NAMED.search(part):
            return THETAS[match[1].upper()]
    known = ", ".join(f"{theta:g} for {name}" for name, theta in THETAS.items())
    raise UserError(
        f"{folder}: expected RoPE's base in config.json or in the folder's published name (as in LWM-Chat-1M-Jax), "
        f"found none: give --rope-theta, which is {known}, or 5e+07 for every model with images"
    )


def model_of(source: Source, told: Mapping[str, Json], theta: float, where: str) -> TransformerConfig:
    """The transformer's shape, from its tensors' shapes.

    Args:
        told: the content of a config.json, {} if there is none. Only num_attention_heads and rms_norm_eps are read.

    Raises UserError for missing tensors, and if the number of heads is not known.
    """
    names = source.names()

    def shape(name: str) -> tuple[int, ...]:
        if name not in names:
            raise UserError(f"{where}: missing {name}: is this LWM's file `params`?")
        return source.shape(name)

    (width,) = shape("transformer/ln_f/kernel")
    layers = len({name for name in names if name.endswith("/attention_norm/kernel")})
    heads = told.get("num_attention_heads", _HEADS.get((width, layers)))
    if heads is None:
        raise UserError(
            f"{where}: expected 32 layers of width 4096, as in LWM's 7B; found {layers} of {width}. For another model, "
            "give num_attention_heads in a config.json in the same folder"
        )
    sizes = {
        "vocab_size": shape("transformer/wte/embedding")[0],
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": shape("transformer/h/0/feed_forward/w1/kernel")[-1],
        "rms_norm_eps": told.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
    }
    return hf_config.read(sizes, LLAMA, where)


def open_lwm(files: Files) -> Published:
    """Opens LWM from its own file `params`. Its models of text alone are also published as Llama, which `--as llama`
    reads."""
    folder = files.folder if files.folder.is_dir() else files.folder.parent
    path = folder / "params" if files.folder.is_dir() else files.folder
    if not path.is_file():
        raise UserError(
            f"{folder}: expected LWM's file `params`, found none (for files of transformers, use --as llama)"
        )
    source, where = Stream(path), str(path)
    config = folder / "config.json"
    told = read_json(config) if config.exists() else {}
    model = model_of(source, told, theta_of(folder, told, files.theta), where)
    sees = "transformer/vte/embedding" in source.names()
    tables: tuple[int, ...] = (model.vocab_size,)
    images: Images | None = None
    if sees:
        tables = (model.vocab_size, source.shape("transformer/vte/embedding")[0])
        images = _images(files)
    tokenizer = images.tokenizer if images else None
    ids = language_of(
        files.names, files.text_ids, tables, tokenizer.codebook_size if tokenizer else 0, str(files.text_file)
    )
    grammar = files.grammar(ids, tokenizer.hash if tokenizer else "")
    model = dataclasses.replace(model, vocab_size=grammar.vocabulary.size)
    seen = {"image_size": [PIXELS, PIXELS], "resize": "crop", "layout": "lwm"} if sees else {}
    return Published(
        system="lwm",
        keys=check_tensors(source, where, [LWM if sees else LWM_TEXT], model, ids.border, tables),
        source=source,
        grammar=grammar,
        text=grammar.text_codec,
        image=tokenizer,
        data={**seen, "max_tokens": _LENGTH},
        loss={"softmax": "by_side"} if sees else {},
        sampling=_SAMPLING if sees else _SAMPLING | {"guidance": 1.0},
        record={
            "system": "lwm",
            "form": "lwm",
            "tables": list(tables),
            "scanned": source.scanned,
            "prefix": list(source.prefix),
            **files.record(),
        },
    )


def _images(files: Files) -> Images:
    if files.image is None:
        raise UserError(
            f"{files.folder}: expected an image tokenizer, found none: convert LWM's `vqgan` with "
            "`ar-unified convert-pickle`, and name the new file with --image"
        )
    return open_images("lwm_vq", files.image)
