"""Chameleon and models made from it: Anole, Lumina-mGPT 1 and 2.0.

The names of tokens say what each id means. The name of an image code is IMGIMG, then the code's decimal digits as
letters (A for 0), then Z. The other tokens are <racm3:break> before an image, <eoss> after it, and <reserved08706>
after a turn.
Lumina adds <reserved08799>, which ends a row, and size tokens: <reserved(8800+n)> stands for n units. Lumina-mGPT 2.0
uses MoVQGAN for images, and Qwen's text tokenizer with these names added after Qwen's own.

Sources: facebookresearch/chameleon, GAIR-NLP/anole, Alpha-VLLM/Lumina-mGPT and Lumina-mGPT-2.0.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from ar_unified.errors import UserError
from ar_unified.interop import hf_config, ids
from ar_unified.interop.files import Files
from ar_unified.interop.hf_config import Family
from ar_unified.interop.ids import Language, language, named, run, same_codes
from ar_unified.interop.images import Images, open_images, read_images
from ar_unified.interop.keys import HF, META, Dialect
from ar_unified.interop.meta import Joined
from ar_unified.interop.published import Published, check_tensors
from ar_unified.interop.sources import DTYPES, Source, inside, open_source, read_json
from ar_unified.interop.untrained import untrained
from ar_unified.language.syntax import ImageLayout
from ar_unified.manifests import Json
from ar_unified.model.config import TransformerConfig

CHAMELEON = Family(
    "chameleon",
    "ChameleonForConditionalGeneration",
    {"qk_norm": "layernorm", "qk_norm_per_head": True},
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e4},
)
_CODE = re.compile(r"IMGIMG([A-J]+)Z")
_LETTERS = str.maketrans("ABCDEFGHIJ", "0123456789")
_FIRST_SIZE = 8800  # the number in the reserved name that stands for 0 units
_MARKS = {"boi": "<racm3:break>", "eoi": "<eoss>", "eot": "<reserved08706>"}
_LUMINA = _MARKS | {"eol": "<reserved08799>"}
SIDE = 32  # codes along a side of Chameleon's images; a side has 512 pixels
_WIDEST = {"lumina_mgpt": 128, "lumina_mgpt_2": 192}  # codes along the longest side: 2048 / 16 and 1536 / 8 pixels
_FIRST_CODE = 155000  # for Lumina-mGPT 2.0, if its text tokenizer has no names for codes
_VQ = "model.vqmodel."
_LENGTH = 4096
# Published settings. Their sources: Chameleon's chameleon.py (guidance: 3.0 for text, 1.2 for images), Anole's
# interleaved_generation.py, Lumina-mGPT's README and inference.
_CHAMELEONS = {"temperature": 0.7, "top_k": 0, "top_p": 0.9}
_CHAMELEON = {
    "max_length": _LENGTH,
    "kv_dtype": "",
    "guidance": 3.0,
    "image_guidance": 1.2,
    "context": "bos_boi",
    "repetition_penalty": 1.2,
    "text": _CHAMELEONS,
    "image": _CHAMELEONS,
}
_SAMPLING: Mapping[str, Mapping[str, object]] = {
    "chameleon": _CHAMELEON,
    "anole": _CHAMELEON | {"text": _CHAMELEONS | {"temperature": 1.0}},
    "lumina_mgpt": {
        "max_length": 2 * _LENGTH,
        "kv_dtype": "",
        "guidance": 4.0,
        "context": "from_boi",
        "text": {"temperature": 1.0, "top_k": 10, "top_p": 1.0},
        "image": {"temperature": 1.0, "top_k": 2000, "top_p": 1.0},
    },
    "lumina_mgpt_2": {
        "max_length": 4 * _LENGTH,
        "kv_dtype": "",
        "guidance": 4.0,
        "context": "from_boi",
        "text": {"temperature": 1.0, "top_k": 10, "top_p": 1.0},
        "image": {"temperature": 1.0, "top_k": 4096, "top_p": 1.0},
    },
}
_UNTRAINED = (
    "This model was not trained to generate images: its head's rows for image codes {}, so images are noise. Anole's "
    "recipe trains these rows: experiments/published/fine_tune.py:recipe=anole."
)
_SIDE_2 = 768  # pixels along a side of a square that has the area of Lumina-mGPT 2.0's images


def codes_of(names: Mapping[str, int], where: str) -> range:
    """The published ids of the image codes, found by their names. Raises UserError if there are none, one is missing,
    or the ids are not consecutive.
    """
    found = {int(match[1].translate(_LETTERS)): id for name, id in names.items() if (match := _CODE.fullmatch(name))}
    return ids.codes_of(found, where)


def language_of(
    names: Mapping[str, int],
    text: list[int],
    size: int,
    system: str,
    where: str,
    largest: tuple[int, int] | None,
    told: Mapping[str, Json] = MappingProxyType({}),
    count: int = 0,
) -> Language:
    """The ids of one of these systems.

    Args:
        names: published id of every token.
        text: published ids that stand for text.
        size: number of ids, V.
        system: chameleon, lumina_mgpt or lumina_mgpt_2.
        largest: height and width of the largest image in codes; None means the published size.
        told: the content of a tokenizer_config.json. For Qwen's tokenizer, it names the begin and end tokens of a text.
        count: number of image codes; used for a Lumina-mGPT 2.0 whose text tokenizer has no names for them.

    Raises UserError for names that are missing or stand for wrong ids.
    """
    if system == "lumina_mgpt_2" and count and not any(map(_CODE.fullmatch, names)):
        codes = range(_FIRST_CODE, _FIRST_CODE + count)
    else:
        codes = codes_of(names, where)
    lumina = system != "chameleon"
    marks = {control: named(names, name, where) for control, name in (_LUMINA if lumina else _MARKS).items()}
    marks |= {control: names[name] for control, name in _ends(names, told, where).items()}
    sizes: list[int] = []
    layout = ImageLayout(system, *(largest or (SIDE, SIDE)))
    if lumina:
        there = next(n for n in itertools.count() if f"<reserved{_FIRST_SIZE + n + 1:05}>" not in names)
        side = min(_WIDEST[system], there * layout.units[0])
        layout = ImageLayout(system, *(min(given, side) for given in largest or (side, side)))
        names_of_sizes = [f"<reserved{_FIRST_SIZE + n:05}>" for n in range(1, layout.size_tokens + 1)]
        sizes = list(run([named(names, name, where) for name in names_of_sizes], "size", where))
    wanted = {name: marks[name] for name in layout.record.controls if name in marks}
    return language(size, text, wanted, layout, codes=codes, sizes=sizes)


def _ends(names: Mapping[str, int], told: Mapping[str, Json], where: str) -> dict[str, str]:
    """The tokens for beginning, end and padding, from Chameleon's own text tokenizer or from Qwen's."""
    if "<s>" in names:
        return {"bos": "<s>", "pad": "<pad>", "eos": "</s>"}
    if "<|endoftext|>" not in names:
        raise UserError(f"{where}: expected a token '<s>' or '<|endoftext|>', found neither")
    # Qwen has no token for the beginning, so a text begins with one of its two end tokens. Our end token is then the
    # other one, which Lumina-mGPT 2.0 never writes.
    both, found = ("<|endoftext|>", "<|im_end|>"), told.get("bos_token") or told.get("eos_token") or "<|endoftext|>"
    begin = found["content"] if isinstance(found, dict) and "content" in found else found
    if begin not in both:
        raise UserError(
            f"{where}: expected eos_token {' or '.join(both)} in tokenizer_config.json, found {begin!r:.40}"
        )
    return {"bos": begin, "eos": both[begin == both[0]]}


# ---- files ------------------------------------------------------------------------------------------------------


def open_anole(files: Files) -> Published:
    """Opens Anole, which is a Chameleon whose head has trained rows for image codes."""
    found = open_chameleon(files)
    return dataclasses.replace(
        found, system="anole", sampling=_SAMPLING["anole"], record={**found.record, "system": "anole"}
    )


def open_chameleon(files: Files) -> Published:
    """Opens Chameleon, in transformers' form or in Meta's."""
    folder = files.folder
    if (folder / "params.json").exists():
        return _open_meta(files)
    where = str(folder)
    config = _model(files.config, where)
    vq = vqgan_of(files, files.config, files.source)
    return _published(files, "chameleon", config, vq, [HF], files.source, files.record() | {"form": "hf"})


def _open_meta(files: Files) -> Published:
    where, folder = str(files.folder), files.folder
    params = read_json(files.find("params.json")).get("model")
    if not isinstance(params, dict):
        raise UserError(f"{where}/params.json: model: expected keys and values, found {params!r:.80}")
    parts = sorted(folder.glob("consolidated*.safetensors"))
    if not parts:
        raise UserError(
            f"{where}: expected consolidated*.safetensors, found none: `ar-unified convert-pickle` makes these files"
        )
    heads: tuple[Any, Any] = params.get("n_heads"), params.get("n_kv_heads") or params.get("n_heads")
    if any(type(count) is not int or count < 1 for count in heads):
        raise UserError(f"{where}/params.json: expected n_heads and n_kv_heads above 0, found {heads}")
    source = Joined([open_source(inside(folder, part.name)) for part in parts], *heads)
    first = "output.weight", "layers.0.feed_forward.w1.weight"
    if missing := [name for name in first if name not in source.names()]:
        raise UserError(f"{where}: missing {missing[0]}: are these files Chameleon's?")
    told = {
        "vocab_size": params.get("vocab_size") or source.shape(first[0])[0],
        "hidden_size": params.get("dim"),
        "num_hidden_layers": params.get("n_layers"),
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": source.shape(first[1])[0],
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": params.get("rope_theta", 1e4),
        "swin_norm": bool(params.get("swin_norm")),
    }
    if params.get("qk_normalization") is False:
        raise UserError(f"{where}/params.json: qk_normalization: expected True, found False")
    record = {"form": "meta", "params": read_json(files.find("params.json")), "files": {}, "parts": len(parts)}
    record |= {"text_file": files.text_file.name}
    return _published(files, "chameleon", _model(told, where), vqgan_of(files, {}), [META], source, record)


def open_lumina(files: Files) -> Published:
    """Opens Lumina-mGPT, whose files have only a transformer. Version 1 uses Chameleon's text tokenizer and VQGAN
    (`--text`, `--image`). Version 2.0 is recognised by Qwen's text tokenizer, and needs movqgan_270M (`--image`)."""
    config = _model(files.config, str(files.folder))
    second = "<s>" not in files.names
    images = _movqgan_of(files) if second else vqgan_of(files, files.config)
    system = "lumina_mgpt_2" if second else "lumina_mgpt"
    return _published(files, system, config, images, [HF], files.source, files.record() | {"form": "hf"})


def _model(config: Mapping[str, Json], where: str) -> TransformerConfig:
    found = hf_config.read(config, CHAMELEON, where)
    if found.norm_eps != 1e-5:
        raise UserError(f"{where}: rms_norm_eps: expected 1e-05, as in the QK-norm; found {found.norm_eps}")
    return dataclasses.replace(found, norm_placement="swin" if config.get("swin_norm") else "pre")


def _movqgan_of(files: Files) -> Images:
    if files.image is None:
        raise UserError(
            f"{files.folder}: expected an image tokenizer, found none: convert movqgan_270M.ckpt with "
            "`ar-unified convert-pickle`, and name the new file with --image"
        )
    return dataclasses.replace(open_images("movqgan", files.image), usual=_SIDE_2)


def vqgan_of(files: Files, config: Mapping[str, Json], source: Source | None = None) -> Images:
    """The image tokenizer from a file of its own if there is one; otherwise the image tokenizer inside the model's
    file, which has no decoder.

    Args:
        source: the model's tensors, which may include an image tokenizer.
    """
    inner = None
    if source is not None and any(name.startswith(_VQ) for name in source.names()):
        inner = read_images("chameleon_vq", config, source, "chameleon_hf", str(files.folder), _VQ)
    if files.image is None:
        if inner is not None:
            return inner
        raise UserError(
            f"{files.folder}: expected an image tokenizer, found none: convert Chameleon's vqgan.ckpt with "
            "`ar-unified convert-pickle`, and name the new file with --image"
        )
    images = open_images("chameleon_vq", files.image, config)
    if inner is None:
        return images
    _require_same_codes(inner, images, str(files.image))
    return dataclasses.replace(inner, tokenizer=images.tokenizer)


def _require_same_codes(inner: Images, images: Images, where: str) -> None:
    """Raises UserError unless `images` (with a decoder) has the same encoder as `inner`, the tokenizer in the model's
    file, within the precision of that file.
    """
    kind = np.dtype(DTYPES[inner.dtypes[""]])
    ours, theirs = inner.tokenizer.params, images.tokenizer.params
    same = inner.tokenizer.config == images.tokenizer.config and all(
        np.array_equal(np.asarray(a).astype(kind), np.asarray(b).astype(kind))
        for part in ("encoder", "quantizer")
        for a, b in zip(jax.tree.leaves(ours[part]), jax.tree.leaves(theirs[part]), strict=True)
    )
    if not same:
        raise UserError(
            f"{where}: expected the encoder that the model's own file has, found another: with --image, name the "
            "image tokenizer that was published with this model"
        )


def _published(
    files: Files,
    system: str,
    config: TransformerConfig,
    images: Images,
    dialects: list[Dialect],
    source: Source,
    record: dict[str, object],
) -> Published:
    where, tokenizer = str(files.folder), images.tokenizer
    beside = files.text_file.with_name("tokenizer_config.json")
    found = language_of(
        files.names,
        files.text_ids,
        config.vocab_size,
        system,
        str(files.text_file),
        files.size or (None if system == "lumina_mgpt_2" else images.grid),
        read_json(beside) if beside.exists() else {},
        tokenizer.codebook_size,
    )
    same_codes(found, tokenizer.codebook_size, str(files.text_file))
    grammar = files.grammar(found, tokenizer.hash)
    config = dataclasses.replace(config, vocab_size=grammar.vocabulary.size)
    aside = (_VQ,) if any(name.startswith(_VQ) for name in source.names()) else ()
    keys = check_tensors(source, where, dialects, config, found.border, aside=aside)
    sized, side = grammar.layout.sized, grammar.layout.height * tokenizer.factor
    notes = [tokenizer.no_decoder] if tokenizer.no_decoder else []
    how = untrained(source.read(str(keys.dialect.names["head"])), found.border, grammar.vocabulary)
    if how:
        notes.append(_UNTRAINED.format(how))
    return Published(
        system="lumina_mgpt" if system == "lumina_mgpt_2" else system,
        keys=keys,
        source=source,
        grammar=grammar,
        text=grammar.text_codec,
        image=tokenizer,
        data={
            "image_size": [side, grammar.layout.width * tokenizer.factor] if not sized else [images.usual] * 2,
            "resize": "aspect" if sized else "crop",
            "layout": system,
            "max_tokens": _LENGTH,
        },
        sampling=_SAMPLING[system],
        record={
            "system": system,
            "qk_groups": list(keys.qk_groups),
            **({"untrained": notes[-1]} if how else {}),
            **(images.record if aside else {}),
            **record,
        },
        notes=tuple(notes),
    )
