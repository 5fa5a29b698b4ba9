"""Writes a model that was trained with this project in a form that other programs read. It is written as a Llama or a
Qwen3, which have the same transformer blocks, with a tokenizer.json.

For other programs the model is a language model whose last ids are image codes. The card says how to read them.
"""

from __future__ import annotations

import json
from pathlib import Path

from ar_tokenizers.text import TextTokenizer
from ar_tokenizers.tokenizer_json import to_tokenizer_json

from ar_unified.bundle import IMAGE, Bundle
from ar_unified.errors import UserError, about
from ar_unified.interop import hf_config
from ar_unified.interop.hf_config import LLAMA, QWEN3
from ar_unified.interop.keys import HF, Keys
from ar_unified.language.border import Border
from ar_unified.language.vocabulary import Vocabulary
from ar_unified.workdir import write_json, write_text


def keys_of(bundle: Bundle) -> Keys:
    """The bundle's tensors with transformers' names. The ids are our own, not published ones."""
    return Keys(HF, bundle.config, Border(((0, 0, bundle.config.vocab_size),)))


def write_own(bundle: Bundle, folder: Path, dtype: str, license: str = "") -> None:
    """Writes everything except the tensors: config.json, tokenizer.json, the image tokenizer and the card.

    Raises UserError if the form cannot express the model.
    """
    config, grammar, text = bundle.config, bundle.grammar, bundle.text_tokenizer
    vocabulary = grammar.vocabulary
    family = QWEN3 if config.qk_norm == "rmsnorm" else LLAMA
    marks = {f"{name}_token_id": vocabulary.control(name) for name in ("bos", "eos", "pad")}
    length = bundle.sections["sampling"].get("max_length", 2048)
    write_json(
        folder / "config.json",
        hf_config.write(config, family, config.vocab_size, dtype, max_position_embeddings=length, **marks),
    )
    if not isinstance(text, TextTokenizer):
        raise UserError(
            f"{bundle.folder}: --to hf: expected a SentencePiece model that was trained here, found {text.file}"
        )
    names = [token_name(vocabulary, id) for id in range(text.size, vocabulary.rest_offset)]
    with about(f"{bundle.folder}: text tokenizer"):
        write_text(folder / "tokenizer.json", to_tokenizer_json(text, names))
    tokens = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad")}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens},
    )
    if (image := bundle.image_tokenizer()) is not None:
        image.save(folder / IMAGE)
    write_text(folder / "README.md", _card(bundle, family.architecture, license))


def token_name(vocabulary: Vocabulary, id: int) -> str:
    """The name of a token that is not text."""
    if id < vocabulary.size_offset:
        return vocabulary.name(id)
    if id < vocabulary.image_offset:
        return f"<size_{id - vocabulary.size_offset + 1}>"
    return f"<image_{id - vocabulary.image_offset}>"


def _card(bundle: Bundle, architecture: str, license: str) -> str:
    vocabulary, layout = bundle.grammar.vocabulary, bundle.grammar.layout
    lines = [
        "---",
        f"license: {json.dumps(license or 'unknown')}",
        "library_name: transformers",
        "---",
        "",
        f"# {bundle.folder.name}",
        "",
        f"An autoregressive model of text and images, written as `{architecture}`." if bundle.has_images else "",
        "Begin a document with `<bos>`; a question ends with `<eot>`, an answer with `<eos>`. Encode text with",
        "`split_special_tokens=True`; otherwise a text that contains `<boi>` would begin an image.",
    ]
    if bundle.has_images:
        size = "`<size_h>` and `<size_w>`, " if layout.sized else ""
        end = ", with `<eol>` after each row" if layout.record.rows != "none" else ""
        largest = "at most" if layout.sized else "always"
        lines += [
            "",
            "## Images",
            "",
            f"An image is `<boi>`, {size}its codes row by row{end}, and `<eoi>`: {largest} {layout.height} rows of "
            f"{layout.width} codes.",
            f"Code c is id {vocabulary.image_offset} + c, `<image_c>`, for c below {vocabulary.codebook_size}.",
            "The tokenizer in this folder turns codes into pixels, and pixels into codes:",
            "",
            "```python",
            "import numpy as np",
            "from ar_tokenizers.image.tokenizer import ImageTokenizer",
            "",
            f"ids = np.full((1, {layout.height}, {layout.width}), {vocabulary.image_offset})  # an image, [B, h, w]",
            f'tokenizer = ImageTokenizer.load("{IMAGE}")',
            f"pixels = tokenizer.decode(ids - {vocabulary.image_offset})  # uint8 [B, H, W, 3]",
            "```",
        ]
    return "\n".join(lines) + "\n"
