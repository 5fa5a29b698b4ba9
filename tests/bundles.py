"""A bundle of tiny random networks and real tokenizers, made in a second: for images of one size, of any size, or for
text only."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ar_tokenizers.image.autoencoder import init as init_image
from ar_tokenizers.image.config import AutoencoderConfig
from ar_tokenizers.image.tokenizer import ImageTokenizer
from ar_tokenizers.text import TextTokenizer

from ar_unified import bundle
from ar_unified.language.grammar import Grammar
from ar_unified.language.syntax import TEXT_ALONE, fixed_grid, sized_rows
from ar_unified.language.vocabulary import Vocabulary
from ar_unified.model.config import config_from
from ar_unified.model.transformer import init

IMAGE = AutoencoderConfig(factor=8, patch=4, width=4, multipliers=(1, 1), blocks=(0, 0), levels=(6, 4))
SENTENCES = [f"A small {colour} star in the top {side}." for colour in ("red", "blue") for side in ("left", "right")]
DATA = {"image_size": [16, 16], "resize": "crop", "layout": "grid", "max_tokens": 48}
SAMPLING = {"max_length": 64, "kv_dtype": "", "guidance": 1.0, "context": "empty_prompt"}
SAMPLING |= {"text": {"temperature": 0.0, "top_k": 0, "top_p": 1.0}, "image": {"temperature": 1.0}}


def fresh(init: Any, config: Any, seed: int) -> Any:
    """Fresh parameters, made by one compiled program instead of one for each shape."""
    return jax.jit(init, static_argnums=0)(config, jax.random.key(seed))


@functools.cache
def parts(layout: str = "grid") -> dict[str, Any]:
    """The arguments of `bundle.write` without the folder. layout: "grid", "rows", or "none" for text only."""
    text = TextTokenizer.train(SENTENCES, 300)
    image = None if layout == "none" else ImageTokenizer(IMAGE, fresh(init_image, IMAGE, 0), batch_size=8)
    if image is None:
        grammar = Grammar(Vocabulary(text.size, 0, text_hash=text.hash), TEXT_ALONE, text)
    else:
        side, how = (0, fixed_grid(2, 2)) if layout == "grid" else (4, sized_rows(4, 4))
        grammar = Grammar(Vocabulary(text.size, image.codebook_size, side, text.hash, image.hash), how, text)
    config = config_from("debug", n_layers=1, vocab_size=grammar.vocabulary.size, qk_norm="rmsnorm", rope_theta=500.0)
    params = jax.tree.map(lambda p: p * 6 if p.ndim > 1 else p, jax.device_get(fresh(init, config, 1)))
    data: dict[str, Any] = {"max_tokens": 48} if image is None else DATA
    if layout == "rows":
        data = data | {"layout": "rows", "resize": "aspect"}
    return dict(
        config=config,
        params=params,
        grammar=grammar,
        text_tokenizer=text,
        image_tokenizer=image,
        data=data,
        sampling=SAMPLING,
        card="# tiny\n",
    )


def write(folder: Path, layout: str = "grid", **changes: Any) -> bundle.Bundle:
    return bundle.write(folder, **parts(layout) | changes)


def write_without_decoder(folder: Path) -> bundle.Bundle:
    """A bundle of layout "grid" with an image tokenizer that can encode images, but not decode codes."""
    of = parts("grid")
    kept = {name: part for name, part in of["image_tokenizer"].params.items() if name != "decoder"}
    tokenizer = ImageTokenizer(IMAGE, kept, batch_size=8)
    vocabulary = dataclasses.replace(of["grammar"].vocabulary, image_hash=tokenizer.hash)
    grammar = Grammar(vocabulary, of["grammar"].layout, of["text_tokenizer"])
    return write(folder, image_tokenizer=tokenizer, grammar=grammar)


def run_card(card: str) -> dict[str, Any]:
    """Runs the example of a model card as it stands; returns the names that it sets."""
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    return names


def grey(height: int = 30, width: int = 20) -> np.ndarray:
    """uint8 [height, width, 3], a ramp of grey."""
    ramp = np.linspace(0, 255, height * width).reshape(height, width)
    return np.repeat(ramp[..., None], 3, axis=-1).astype(np.uint8)
