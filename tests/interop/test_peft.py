"""PEFT's adapters give transformers' logits here, and our adapters give our logits there; needs PEFT."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [
    pytest.mark.interop,
]
torch = pytest.importorskip("torch", reason="PEFT's adapters need torch (make test-interop)")
peft_library = pytest.importorskip("peft", reason="the other side of these tests is PEFT (make test-interop)")

import ar_unified  # noqa: E402
from ar_unified.bundle import Bundle  # noqa: E402
from ar_unified.interop import peft  # noqa: E402
from ar_unified.interop.token_rows import TokenRows  # noqa: E402
from ar_unified.model.lora import LoraConfig  # noqa: E402
from tests import adapters  # noqa: E402
from tests.interop import published as make  # noqa: E402
from tests.interop import reference, tables  # noqa: E402
from tests.interop.test_parity import import_as  # noqa: E402

LOGITS = 5e-5
CASES = {
    "llama": ("llama", lambda folder: make.causal(folder, "llama"), tables.llama),
    "qwen3": ("qwen", lambda folder: make.causal(folder, "qwen3"), tables.qwen),
    "gemma": ("gemma", lambda folder: make.causal(folder, "gemma"), tables.gemma),
    "chameleon": ("chameleon", make.chameleon, tables.chameleon),
    "emu3": ("emu3", make.emu3, lambda: tables.emu3(placeholder="<image>")),
}
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def same_logits(folder: Path, ids: np.ndarray, size: int, changed: Sequence[int], **wrapped: Any) -> None:
    """With each adapter (a folder of that name in `folder`), the bundle in `folder` has the logits of PEFT's wrapped
    model. Only the ids `changed` may differ from the published model. Without an adapter, the bundle has the published
    model's logits."""
    model = ar_unified.load(folder / "bundle", dtype="float32", adapters={name: folder / name for name in wrapped})
    columns = np.asarray(model.ids.ours(np.arange(size)))
    base = reference.load(folder / "published").logits(ids)[..., :size]
    for name, theirs in wrapped.items():
        expected = reference.Reference(theirs.base_model.model.eval()).logits(ids)[..., :size]
        found = model.logits(model.ids.ours(ids), adapter=name)[..., columns]
        assert np.abs(found - expected).max() < LOGITS * max(np.abs(expected).max(), 1.0), name
        assert np.abs(expected - base)[..., list(changed)].max() > 1000 * LOGITS, "the adapter changes nothing"
    np.testing.assert_allclose(model.logits(model.ids.ours(ids))[..., columns], base, atol=LOGITS * np.abs(base).max())


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_is_the_same_there_and_here(name: str, tmp_path: Path) -> None:
    system, maker, table = CASES[name]
    published, size = maker(tmp_path / "published"), table().size
    import_as(system, published, tmp_path / "bundle")
    bundle = Bundle(tmp_path / "bundle")
    ids = np.random.default_rng(1).choice(table().text[:200], (2, 12))

    # ---- PEFT writes, we read
    oracle = reference.load(published)
    scope = {"emu3": r".*text_model.*\.(" + "|".join(MODULES) + ")"}.get(name, MODULES)
    others = dict(rank_pattern={r"layers\.0\.self_attn\.q_proj": 7, "up_proj": 2}, alpha_pattern={"up_proj": 9})
    config = peft_library.LoraConfig(
        r=4, lora_alpha=6, target_modules=scope, use_rslora=name == "qwen3", **(others if name != "gemma" else {})
    )
    theirs = peft_library.get_peft_model(oracle.model, config)
    torch.manual_seed(0)
    for key, tensor in theirs.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(tensor, std=0.05)
    theirs.save_pretrained(tmp_path / "theirs")

    # ---- we write, PEFT reads
    lora = LoraConfig(rank=3, alpha=5.0, targets=("attention.query", "attention.output", "mlp"), rslora=name == "gemma")
    if name != "qwen3":
        lora = dataclasses.replace(lora, ranks=("mlp=2", "mlp.up=6"), alphas=("attention.output=7",))
    adapters.write(tmp_path / "ours", bundle, lora, seed=2, spread=0.05)
    again = reference.load(published)
    loaded = peft_library.PeftModel.from_pretrained(again.model, tmp_path / "ours")
    changed = [key for key, _ in loaded.named_parameters() if "lora_" in key]
    assert len(changed) == 2 * 5 * bundle.config.n_layers, changed

    same_logits(tmp_path, ids, size, range(size), theirs=theirs, ours=loaded)
    shutil.rmtree(tmp_path / "published")


@pytest.mark.parametrize("kind, system, tied", [("llama", "llama", False), ("gemma", "gemma", True)])
def test_rows_of_ids_are_the_same_there_and_here(kind: str, system: str, tied: bool, tmp_path: Path) -> None:
    """The adapter has new values for some rows of the embedding and of the head. The rows belong to existing ids, which
    PEFT treats like new ones."""
    published, size = make.causal(tmp_path / "published", kind), CASES[kind][2]().size
    import_as(system, published, tmp_path / "bundle")
    bundle = Bundle(tmp_path / "bundle")
    ids = np.random.default_rng(1).choice(CASES[kind][2]().text[:200], (2, 12))
    chosen = sorted({int(id) for id in ids[:, :4].ravel()})
    asked = {"embed_tokens": chosen} | ({} if tied else {"lm_head": chosen[:3]})

    # ---- PEFT writes, we read
    config = peft_library.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], trainable_token_indices=asked)
    theirs = peft_library.get_peft_model(reference.load(published).model, config)
    torch.manual_seed(0)
    for key, tensor in theirs.named_parameters():
        if "lora_B" in key or "trainable_tokens_delta" in key:
            torch.nn.init.normal_(tensor, std=0.05)
    theirs.save_pretrained(tmp_path / "theirs")

    # ---- we write, PEFT reads
    lora, rng = LoraConfig(rank=3, alpha=5.0, targets=("mlp",)), np.random.default_rng(5)
    rows = {
        {"embed_tokens": "embedding", "lm_head": "head"}[module]: TokenRows(
            np.array(which), rng.normal(0, 0.05, (len(which), bundle.config.d_model)).astype(np.float32)
        )
        for module, which in asked.items()
    }
    peft.write(tmp_path / "ours", bundle, lora, adapters.drawn(bundle.config, lora, seed=2, spread=0.05), rows)
    loaded = peft_library.PeftModel.from_pretrained(reference.load(published).model, tmp_path / "ours")

    same_logits(tmp_path, ids, size, chosen[:3], theirs=theirs, ours=loaded)
