"""Arguments of `bundle.write` for tiny models with the ids of a published table: random weights, published
tokenizers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from ar_tokenizers.image.autoencoder import init as init_image
from ar_tokenizers.image.tokenizer import ImageTokenizer

from ar_unified.language.border import Border, MappedCodec
from ar_unified.language.grammar import Grammar
from ar_unified.language.syntax import TEXT_ALONE, ImageLayout
from ar_unified.language.vocabulary import Vocabulary
from ar_unified.model.config import config_from
from ar_unified.model.transformer import init
from tests import tokenizer_files as files
from tests.bundles import DATA, IMAGE, SAMPLING, fresh

TABLES: dict[str, Any] = {  # name and content of the text tokenizer's file, text ids, controls, image code 0, V
    "chameleon": (
        "tokenizer.json",
        files.byte_level,
        range(len(files.SPECIAL), 362),
        dict(pad=1, bos=0, eos=2, eot=29, boi=28, eoi=27),
        3,
        363,
    ),
    "emu3": (
        "text.tiktoken",
        lambda: files.tiktoken_file(files.ranks()),
        range(600),
        dict(pad=600, bos=606, eos=607, boi=609, eoi=610, img=608, eol=603, eof=604, frame=605),
        611,
        635,
    ),
    "llama": ("text.model", files.dummy_prefix, range(3, 400), dict(pad=0, bos=1, eos=2, eot=400), 0, 401),
}


def border_of(kind: str) -> Border:
    """The border of a kind's table: text, then controls, codes, and all other ids."""
    _, _, text, controls, code, V = TABLES[kind]
    known = [*text, *controls.values(), *(range(code, code + 24) if kind != "llama" else ())]
    return Border.from_ids([*known, *sorted(set(range(V)) - set(known))])


@functools.cache
def parts(kind: str) -> dict[str, Any]:
    """kind: "chameleon", "emu3", or "llama" for text only."""
    file, data, text_ids, controls, _, V = TABLES[kind]
    text = MappedCodec.of(file, data(), border_of(kind), len(text_ids), "warn")
    alone = kind == "llama"
    image = None if alone else ImageTokenizer(IMAGE, fresh(init_image, IMAGE, 0), batch_size=8)
    layout = TEXT_ALONE if alone else ImageLayout(kind, *((2, 2) if kind == "chameleon" else (12, 12)))
    vocabulary = Vocabulary(
        text.size,
        0 if image is None else image.codebook_size,
        text_hash=text.hash,
        image_hash="" if image is None else image.hash,
        controls=tuple(controls),
        rest=V - text.size - len(controls) - (0 if alone else 24),
    )
    config = config_from("debug", n_layers=1, vocab_size=vocabulary.size, qk_norm="layernorm", rope_theta=500.0)
    params = jax.tree.map(lambda p: p * 6 if p.ndim > 1 else p, jax.device_get(fresh(init, config, 1)))
    shape = {} if alone else DATA | {"layout": kind, "resize": "crop" if kind == "chameleon" else "aspect"}
    return dict(
        config=config,
        params=params,
        grammar=Grammar(vocabulary, layout, text),
        text_tokenizer=text,
        image_tokenizer=image,
        data=shape | {"max_tokens": 160},
        sampling=SAMPLING | {"max_length": 192},
        card="# tiny\n",
        published={"system": kind, "config": {"vocab_size": V, "nested": [1, None]}},
        kept={"temporal/kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "half": np.ones(3, np.float16)},
    )
