"""An adapter for a text model that learns images. The rows of new ids are trained, saved, merged and served with it."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from ar_tokenizers.text import TextTokenizer
from safetensors.numpy import load_file

import ar_unified
from ar_unified.bundle import Bundle, named
from ar_unified.checkpoint import Checkpoints
from ar_unified.cli.main import main
from ar_unified.errors import UserError
from ar_unified.interop import peft
from ar_unified.language.extension import new_ids, rows_of
from ar_unified.language.vocabulary import Role
from tests.cli import test_from_llm as llms
from tests.cli.conftest import command, refused

text, images = llms.text, llms.images  # fixtures of that module
LORA = dict(lora__rank=2, lora__alpha=4.0, training__steps=6, training__learning_rate=0.02, training__warmup_steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("tied, base_dtype", [(True, "float32"), (False, "int8")])
def test_new_rows_are_trained_beside_an_adapter_and_go_with_it(
    folder: Path, text: TextTokenizer, images: Path, tmp_path: Path, capsys, tied: bool, base_dtype: str
) -> None:
    llm = llms.write(tmp_path / "llm", text, tie_embeddings=tied)
    more = LORA | dict(model__tie_embeddings=tied, lora__base_dtype=base_dtype)
    for verb in ("tokenizer", "prepare", "train"):
        assert main(llms.extending(verb, folder, tmp_path / "w", llm, images, **more)) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    tables = ("embedding",) if tied else ("embedding", "head")
    assert all(f"rows of {table}" in said for table in tables) and "lora" in said
    stored = Checkpoints(tmp_path / "w" / "model" / "checkpoints", readonly=True).restore(params=None)["params"]
    assert stored.keys() == {"lora", *tables}
    out = ["export", "--workdir", str(tmp_path / "w"), "--output"]
    for form in ((), ("--to", "base"), ("--to", "peft")):
        assert main([*out, str(tmp_path / (form[-1] if form else "merged")), *form]) == 0

    # ---- merged: the rows, the matrices with the adapter, and nothing else
    before, after, base = Bundle(llm), Bundle(tmp_path / "merged"), Bundle(tmp_path / "base")
    rows = rows_of(before.grammar.vocabulary, after.grammar.vocabulary)
    old, new, bare = (named(jax.device_get(each.params())) for each in (before, after, base))
    fresh = list(new_ids(before.grammar.vocabulary, after.grammar.vocabulary))
    for table in tables:
        np.testing.assert_array_equal(new[table][rows >= 0], old[table][rows[rows >= 0]])
        np.testing.assert_array_equal(new[table][fresh], stored[table])
        np.testing.assert_array_equal(new[table], bare[table])
        assert len(np.unique(new[table][fresh], axis=0)) > 0.9 * len(fresh)
    changed = [name for name in old if name not in tables and not np.array_equal(old[name], new[name])]
    assert sorted(changed) == sorted(name for name in old if name.startswith("layers.") and old[name].ndim > 2)
    assert all(np.array_equal(old[name], bare[name]) for name in old if name not in tables)

    # ---- the extended model with the adapter has the same logits as the merged model
    tensors = load_file(tmp_path / "peft" / peft.WEIGHTS)
    of_rows = [name for name in tensors if name.endswith("trainable_tokens_delta")]
    assert len(of_rows) == len(tables) and all(tensors[name].shape == (len(fresh), 32) for name in of_rows)
    served = ar_unified.load(base.folder, dtype="float32", adapters={"mine": tmp_path / "peft"})
    inside = ar_unified.load(after.folder, dtype="float32")
    tokens = np.array([[before.grammar.vocabulary.bos, *text.encode("a big red circle")[:6], *fresh[:8]]])
    logits = inside.logits(tokens)
    assert np.abs(served.logits(tokens, adapter="mine") - logits).max() < 1e-5 * np.abs(logits).max()
    assert np.abs(served.logits(tokens) - logits).max() > 1e-3 * np.abs(logits).max(), "the adapter changes nothing"
    refused(
        ["export", "--workdir", str(tmp_path / "w"), "--output", str(tmp_path / "no"), "--to", "base"]
        + ["--config.lora.rank=0"],
        "config.lora.rank",
    )
    with pytest.raises(UserError, match="its rows are for the ids of another vocabulary: load it with"):
        ar_unified.load(llm, adapters={"mine": tmp_path / "peft"})

    # ---- another training starts from the adapter and its rows, with the language model or with the extended one
    slow = dict(lora__init=tmp_path / "peft", training__steps=2, training__learning_rate=1e-7)
    for verb in ("tokenizer", "prepare", "train"):
        assert main(llms.extending(verb, folder, tmp_path / "w2", llm, images, **more | slow)) == 0, (
            capsys.readouterr().err
        )
    images_of = dict(steps=0, width=8, blocks="(0,0,1)", levels="(8,5,5,5)")  # of the bundle's image tokenizer
    described = {f"image_tokenizer__{key}": value for key, value in images_of.items()}
    argv = command("train", folder, tmp_path / "w3", init=base.folder, **more | slow | described)
    kinds = [f"{table}[{kind}]" for table in tables for kind in ("size", "image")]
    refused(argv, r"config.training.only: expected embedding\[size\], embedding\[image\] in it: the adapter")
    begun = {"w2": fresh}
    for verb in ("tokenizer", "prepare", "train"):
        assert main([verb, *argv[1:], f"--config.training.only={tuple(kinds)}"]) == 0, capsys.readouterr().err
    vocabulary = base.grammar.vocabulary
    begun["w3"] = [*vocabulary.ids(Role.SIZE), *vocabulary.ids(Role.IMAGE)]
    for workdir, ids in begun.items():
        last = Checkpoints(tmp_path / workdir / "model" / "checkpoints", readonly=True).restore(params=None)["params"]
        for table in tables:
            np.testing.assert_allclose(last[table], new[table][ids], atol=1e-5)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), last["lora"], stored["lora"])
