"""What is sent between devices in a compiled training step, and what must not be sent."""

from __future__ import annotations

import math
import re

from jax.sharding import Mesh

from ar_unified.model.config import TransformerConfig


def collectives(text):
    """(kind, elements of its largest array, whether it is in a loop) of each collective of an HLO module."""
    line = re.compile(
        r"= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\((.*)", re.M
    )
    for shapes, kind, rest in line.findall(text):
        sizes = [math.prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\w\[([\d,]*)\]", shapes)]
        yield kind, max(sizes), "while/body" in rest


def assert_nothing_travels_whole(text: str, config: TransformerConfig, mesh: Mesh, rows: int, length: int, chunk: int):
    """Checks the HLO text of a step on rows x length tokens: no table, no set of parameters and no chunk of logits is
    sent."""
    ways = dict(mesh.shape)
    matrix = config.d_model * max(config.d_mlp, config.n_heads * config.head_dim) // ways["tensor"]
    tokens = rows * length // (ways["data"] * ways["fsdp"])  # all of a device's rows
    collected = ways["context"] > 1 and config.context == "gather"
    keys = tokens * config.n_kv_heads * config.head_dim // ways["tensor"] if collected else 0
    activations = tokens * config.d_model // ways["context"]
    head, logits = (n * config.vocab_size // ways["tensor"] for n in (config.d_model, chunk))
    assert (
        max(matrix, keys) < tokens * config.d_model and activations < logits
    )  # otherwise the bounds would prove nothing

    found = list(collectives(text))
    gathered = {(elements, looped) for kind, elements, looped in found if kind == "all-gather"}
    assert gathered and max(elements for elements, looped in gathered if looped) <= max(matrix, keys)
    assert max(elements for elements, looped in gathered if not looped) <= head  # once, over fsdp, not over tensor
    assert max(elements for _, elements, looped in found if looped) <= max(matrix, keys, activations)
    assert max(elements for _, elements, _ in found) < logits
