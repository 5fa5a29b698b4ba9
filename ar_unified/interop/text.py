"""Plain language models in transformers' form: Llama, Qwen2, Qwen3 and Gemma. A text model that was trained here and
exported (`own`) is such a Llama or Qwen3, with our own control tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ar_unified.errors import UserError
from ar_unified.interop import hf_config
from ar_unified.interop.files import Files
from ar_unified.interop.hf_config import GEMMA, LLAMA, QWEN2, QWEN3, Family
from ar_unified.interop.ids import PLAIN, Language, language
from ar_unified.interop.keys import HF
from ar_unified.interop.published import Published, check_tensors
from ar_unified.interop.sources import read_json
from ar_unified.language.syntax import TEXT_ALONE
from ar_unified.language.vocabulary import CONTROLS
from ar_unified.model.config import TransformerConfig

# Tokens for a document's beginning and end, and for padding: the first of these names that the tokenizer has. Qwen has
# no token for the beginning; <|endoftext|> separates texts.
_MARKS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "llama": {
        "bos": ("<|begin_of_text|>", "<s>"),
        "eos": ("<|end_of_text|>", "</s>"),
        "pad": ("<|finetune_right_pad_id|>", "<unk>"),
    },
    "qwen": {"bos": ("<|endoftext|>",), "eos": ("<|im_end|>",)},
    "gemma": {"bos": ("<bos>",), "eos": ("<eos>",), "pad": ("<pad>",)},
}
_OURS = {control: (f"<{control}>",) for control in CONTROLS}  # in a tokenizer.json that an export here has written
PLAIN_FILTER = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
_LENGTH = 4096  # default maximum number of tokens of a prompt and its answer together


def open_llama(files: Files) -> Published:
    """Opens a Llama in transformers' form. Raises UserError, which names the file, if something does not fit."""
    return _open(files, "llama", {"llama": LLAMA})


def open_qwen(files: Files) -> Published:
    """Opens a Qwen2 or Qwen3 in transformers' form. Raises UserError, which names the file, if something does not
    fit."""
    return _open(files, "qwen", {"qwen2": QWEN2, "qwen3": QWEN3})


def open_gemma(files: Files) -> Published:
    """Opens a Gemma in transformers' form. Raises UserError, which names the file, if something does not fit."""
    return _open(files, "gemma", {"gemma": GEMMA})


def _open(files: Files, system: str, families: Mapping[str, Family]) -> Published:
    where = str(files.folder)
    kind = str(files.config.get("model_type"))
    if kind not in families:
        raise UserError(f"{where}: model_type: expected {' or '.join(families)}, found {kind!r:.40}")
    family = families[kind]
    config = hf_config.read(files.config, family, where)
    beside = files.folder / "added_tokens.json"
    if "<image_0>" in files.names or (beside.exists() and "<image_0>" in read_json(beside)):
        raise UserError(
            f"{where}: expected a model of text alone, found one with images that ar_unified exported: these files do "
            "not say how images are laid out, so use the bundle that was exported"
        )
    ours = all(name in files.names for names in _OURS.values() for name in names)
    marks = {
        control: next((files.names[name] for name in names if name in files.names), None)
        for control, names in (_OURS if ours else _MARKS[system]).items()
    }
    found = {control: id for control, id in marks.items() if id is not None}
    if absent := [control for control in ("bos", "eos") if control not in found]:
        expected = " or ".join(_MARKS[system][absent[0]])
        raise UserError(
            f"{files.text_file}: expected a token {expected}, found none. Check that --as names the right system"
        )
    ids = language(config.vocab_size, files.text_ids, found, TEXT_ALONE if ours else PLAIN)
    return without_images(files, system, config, ids)


def without_images(
    files: Files, system: str, config: TransformerConfig, ids: Language, *notes: str, **sampling: object
) -> Published:
    """A model without an image tokenizer: for text alone, or with images as codes alone.

    Args:
        sampling: default settings of requests, where they differ from plain sampling.
    """
    grammar = files.grammar(ids)
    config = dataclasses.replace(config, vocab_size=grammar.vocabulary.size)
    plain = {
        "max_length": min(_LENGTH, files.config.get("max_position_embeddings") or _LENGTH),
        "kv_dtype": "",
        "guidance": 1.0,
        "context": "bos_boi",
        "text": PLAIN_FILTER,
        "image": PLAIN_FILTER,
    }
    return Published(
        system=system,
        keys=check_tensors(files.source, str(files.folder), [HF], config, ids.border),
        source=files.source,
        grammar=grammar,
        text=grammar.text_codec,
        image=None,
        data={"max_tokens": _LENGTH},
        sampling=plain | sampling,
        record={"system": system, "form": "hf", **files.record()},
        notes=notes,
    )
