"""Chameleon and what grew from it: Anole, and Lumina-mGPT 1 and 2.0.

One table of ids, by the names of its tokens: image codes are IMGIMG, the code's decimal digits as letters (A for 0)
and Z; the others are <racm3:break> in front of an image, <eoss> behind it, <reserved08706> behind a turn. Lumina adds an
end of rows, <reserved08799>, and sizes from <reserved08800> on, <reserved(8800+n)> for n units.

Sources: facebookresearch/chameleon, GAIR-NLP/anole, Alpha-VLLM/Lumina-mGPT and Lumina-mGPT-2.0.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from ar_unified.errors import UserError
from ar_unified.interop import hf_config
from ar_unified.interop.hf_config import Family
from ar_unified.interop.ids import Language, language, named, run
from ar_unified.language.syntax import ImageLayout
from ar_unified.model.config import TransformerConfig

CHAMELEON = Family(
    "chameleon",
    "ChameleonForConditionalGeneration",
    {"qk_norm": "layernorm", "qk_norm_per_head": True},
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e4},
)
_CODE = re.compile(r"IMGIMG([A-J]+)Z")
_LETTERS = str.maketrans("ABCDEFGHIJ", "0123456789")
_FIRST_SIZE = 8800  # of the reserved names: 0 units
_MARKS = {"boi": "<racm3:break>", "eoi": "<eoss>", "eot": "<reserved08706>"}
_LUMINA = _MARKS | {"eol": "<reserved08799>"}
SIDE = 32  # codes along Chameleon's images, 512 pixels


def codes_of(names: Mapping[str, int], where: str) -> range:
    """Published ids of the image codes, by their names. Raises UserError: none, one is missing, they are no run."""
    found = {int(match[1].translate(_LETTERS)): id for name, id in names.items() if (match := _CODE.fullmatch(name))}
    if not found or sorted(found) != list(range(len(found))):
        missing = next(code for code in range(len(found) + 1) if code not in found)
        raise UserError(f"{where}: expected a token for each image code, found none for code {missing}")
    return run([found[code] for code in sorted(found)], "image code", where)


def language_of(
    names: Mapping[str, int], text: list[int], size: int, system: str, where: str, largest: tuple[int, int] | None
) -> Language:
    """The ids of one of these systems.

    Args:
        names: published id of every token. text: those that text is spelled with. size: V.
        system: chameleon, lumina_mgpt or lumina_mgpt_2.
        largest: height and width of an image in codes; None: as published.

    Raises UserError for names that are missing or stand for other ids than they should.
    """
    codes = codes_of(names, where)
    lumina = system != "chameleon"
    marks = {control: named(names, name, where) for control, name in (_LUMINA if lumina else _MARKS).items()}
    marks |= {control: names[name] for control, name in _ends(names, where).items()}
    sizes: list[int] = []
    layout = ImageLayout(system, *(largest or (SIDE, SIDE)))
    if lumina:
        layout = ImageLayout(system, *(largest or (_WIDEST[system], _WIDEST[system])))
        names_of_sizes = [f"<reserved{_FIRST_SIZE + n:05}>" for n in range(1, layout.size_tokens + 1)]
        sizes = list(run([named(names, name, where) for name in names_of_sizes], "size", where))
    wanted = {name: marks[name] for name in layout.record.controls if name in marks}
    return language(size, text, wanted, layout, codes=codes, sizes=sizes)


_WIDEST = {"lumina_mgpt": 128, "lumina_mgpt_2": 192}  # codes: 2048 pixels of 16 a code, 1536 of 8


def _ends(names: Mapping[str, int], where: str) -> dict[str, str]:
    """Of a text tokenizer of Chameleon's own or of Qwen's: what begins, ends and pads."""
    if "<s>" in names:
        return {"bos": "<s>", "pad": "<pad>", "eos": "</s>"}
    if "<|endoftext|>" not in names:
        raise UserError(f"{where}: expected a token '<s>' or '<|endoftext|>', found neither")
    return {"bos": "<|endoftext|>", "eos": "<|im_end|>"}  # Qwen has no beginning


def model_of(config: Mapping, where: str) -> TransformerConfig:
    """The transformer of config.json. Raises UserError."""
    found = hf_config.read(config, CHAMELEON, where)
    if found.norm_eps != 1e-5:
        raise UserError(f"{where}: rms_norm_eps: expected 1e-05, as its QK-norm has; found {found.norm_eps}")
    return dataclasses.replace(found, norm_placement="swin" if config.get("swin_norm") else "pre")
