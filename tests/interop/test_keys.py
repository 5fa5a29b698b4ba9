"""Names, axis order and RoPE order of published tensors: conversion to ours and back, and their meaning."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest

from ar_unified.interop.keys import HF, LWM, META, Dialect, Keys, Slot
from ar_unified.language.border import Border
from ar_unified.model.config import TransformerConfig

V, SIDES = 22, (15, 7)
CONFIG = TransformerConfig(
    vocab_size=128, d_model=12, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_mlp=10, qk_norm="layernorm"
)
BORDER = Border.from_ids([*range(5, V), *range(5)])
PLAIN = dataclasses.replace(CONFIG, qk_norm="none")


def drawn(keys: Keys) -> Iterator[tuple[Slot, tuple[np.ndarray, ...]]]:
    rng = np.random.default_rng(0)
    for slot in keys.slots():
        yield slot, tuple(rng.normal(size=shape).astype(ml_dtypes.bfloat16) for shape in slot.shapes)


@pytest.mark.parametrize(
    "keys",
    [
        Keys(HF, CONFIG, BORDER),
        Keys(HF, dataclasses.replace(CONFIG, qk_norm="rmsnorm", tie_embeddings=True), BORDER),
        Keys(META, CONFIG, BORDER),
        Keys(LWM, PLAIN, BORDER, tables=SIDES),
    ],
    ids=["transformers", "tied", "meta", "lwm"],
)
def test_there_and_back_is_the_same_bit_for_bit(keys: Keys) -> None:
    names = [name for slot in keys.slots() for name in slot.names]
    assert len(names) == len(set(names)) and not any("{" in name for name in names)
    for slot, theirs in drawn(keys):
        ours = keys.to_ours(slot, theirs)
        assert ours.shape == slot.shape and ours.dtype == ml_dtypes.bfloat16
        back = keys.to_theirs(slot, ours)
        assert len(back) == len(theirs)
        for want, found in zip(theirs, back, strict=True):
            assert found.shape == want.shape and found.tobytes() == want.tobytes(), slot


def test_a_row_of_the_tables_stands_where_its_id_is() -> None:
    keys = Keys(LWM, PLAIN, BORDER, tables=SIDES)
    slots = {slot.leaf: (slot, theirs) for slot, theirs in drawn(keys)}
    slot, (text, image) = slots["embedding"]
    ours = keys.to_ours(slot, (text, image))
    assert (ours[BORDER.ours[3]] == text[3]).all() and (ours[BORDER.ours[15 + 2]] == image[2]).all()
    slot, (text, image) = slots["head"]
    assert text.shape == (12, 15)
    ours = keys.to_ours(slot, (text, image))
    assert (ours[BORDER.ours[3]] == text[:, 3]).all() and (ours[BORDER.ours[15 + 2]] == image[:, 2]).all()
    assert not ours[V:].any() and len(ours) == 128


def rotated(x: np.ndarray, angle: np.ndarray, interleaved: bool) -> np.ndarray:
    """RoPE written out: x [..., H], angle [H/2]."""
    out = np.empty_like(x)
    H = x.shape[-1]
    for i in range(H // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + H // 2)
        out[..., a] = x[..., a] * np.cos(angle[i]) - x[..., b] * np.sin(angle[i])
        out[..., b] = x[..., b] * np.cos(angle[i]) + x[..., a] * np.sin(angle[i])
    return out


@pytest.mark.parametrize("dialect", [HF, META, LWM], ids=lambda dialect: dialect.name)
def test_queries_meet_keys_as_the_original_turns_them(dialect: Dialect) -> None:
    config = CONFIG if dialect is META else PLAIN
    keys = Keys(dialect, config, BORDER, tables=SIDES if dialect is LWM else ())
    rng = np.random.default_rng(1)
    x, angle = rng.normal(size=12), rng.normal(size=3)
    found = {}
    for slot, theirs in drawn(keys):
        if slot.layer == 0 and slot.leaf in ("layers.attention.query", "layers.attention.key"):
            side = theirs[0].astype(float)
            there = (x @ (side.T if dialect.out_first else side)).reshape(-1, 6)
            here = np.einsum("d,dnh->nh", x, keys.to_ours(slot, theirs).astype(float))
            found[slot.leaf] = (
                rotated(there, angle, interleaved=dialect.interleaved),
                rotated(here, angle, interleaved=False),
            )
    (q_there, q_here), (k_there, k_here) = found["layers.attention.query"], found["layers.attention.key"]
    np.testing.assert_allclose(q_here @ k_here.T, q_there @ k_there.T, atol=1e-12)


def test_norms_of_heads_turn_with_the_heads() -> None:
    keys = Keys(META, CONFIG, BORDER)
    found = {slot.leaf: (slot, theirs) for slot, theirs in drawn(keys) if slot.layer == 0}
    for name in ("query_norm.scale", "query_norm.bias", "key_norm.scale"):
        slot, (theirs,) = found[f"layers.attention.{name}"]
        assert (keys.to_ours(slot, (theirs,)) == theirs[[0, 2, 4, 1, 3, 5]]).all()
    slot, (theirs,) = found["layers.attention.norm"]
    assert (keys.to_ours(slot, (theirs,)) == theirs).all()


def test_what_a_dialect_has_no_name_for_is_refused() -> None:
    with pytest.raises(ValueError, match="no tensor in LWM's streams for layers.attention.key_norm.bias"):
        Keys(LWM, CONFIG, BORDER, tables=SIDES)
