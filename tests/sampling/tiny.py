"""A random transformer of a few thousand parameters, both layouts, and a text tokenizer of 16 letters."""

from __future__ import annotations

from functools import partial

import jax

from ar_unified.language.grammar import Grammar
from ar_unified.language.syntax import fixed_grid, sized_rows
from ar_unified.language.vocabulary import Vocabulary
from ar_unified.model.config import TransformerConfig
from ar_unified.model.transformer import init


class Letters:
    """One id per letter a..p."""

    size = 16

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids) -> str:
        return "".join(chr(ord("a") + i) for i in ids)


GRAMMARS = {
    "grid": Grammar(Vocabulary(16, 24), fixed_grid(2, 3), Letters()),
    "rows": Grammar(Vocabulary(16, 24, size_tokens=4), sized_rows(3, 4), Letters()),
}
CONFIG = TransformerConfig(
    vocab_size=128, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_mlp=48, qk_norm="rmsnorm"
)


ENLARGED = 6  # the matrices of random_params, by the ones that init draws


def random_params(seed: int = 0, config: TransformerConfig = CONFIG):
    """Weights large enough that logits differ by several nats and contexts matter."""
    return _random_params(config, seed)


@partial(jax.jit, static_argnums=0)  # without jit there is a program for every shape
def _random_params(config, seed):
    return jax.tree.map(lambda p: p * ENLARGED if p.ndim > 1 else p, init(config, jax.random.key(seed)))
