"""Small versions of what a reader already has before the first command of a page: files, and a machine."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ar_tokenizers.image import autoencoder, movq_weights
from ar_tokenizers.image.config import AutoencoderConfig
from ar_tokenizers.image.published import settings_of
from ar_tokenizers.image.tokenizer import ImageTokenizer
from ar_tokenizers.text import TextTokenizer
from safetensors.numpy import save_file

from tests.bundles import fresh
from tests.cli import test_from_llm, test_mixture, test_text_alone
from tests.cli.conftest import ROOT
from tests.interop import formats, tables
from tests.interop.weights import Sizes, drawn, transformer_shapes
from tests.tokenizers import test_movq


def pairs(here: Path) -> None:
    """pairs.jsonl: pairs of pictures and of texts. Its images are those of `mine`."""
    rows: list[dict[str, Any]] = []
    for i in range(0, 38, 2):
        right, wrong = ([{"type": "image", "image": f"mine/{j}.png"}] for j in (i, i + 1))
        rows.append({"prompt": f"Draw number {i}.", "chosen": right, "rejected": wrong})
        rows.append({"prompt": [*right, {"type": "text", "text": "What is it?"}], "chosen": "A.", "rejected": "B."})
    (here / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def sets(here: Path) -> None:
    """The five sets of experiments/mixture.py."""
    test_mixture.make(here / "sets")


def words(here: Path) -> None:
    """words.py, an experiment with text alone; its texts; and prompts for its model."""
    (here / "words").mkdir()
    lines = [f"the red circle {i} stands left of the blue square and smiles" for i in range(40)]
    (here / "words" / "a.txt").write_text("\n".join(lines))
    (here / "words.py").write_text(test_text_alone.CONFIG)
    (here / "prompts.jsonl").write_text('{"prompt": "the red", "mode": "text", "n": 2}\n')


def results(here: Path) -> None:
    """The page that experiments/benchmarks/gallery.py writes into."""
    (here / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "results.md", here / "docs")


# ---- downloads -------------------------------------------------------------------------------------------------------


def tokenizer(here: Path) -> None:
    """The folder of an image tokenizer that was never trained."""
    config = AutoencoderConfig(width=8, blocks=(0, 0, 1))
    ImageTokenizer(config, fresh(autoencoder.init, config, 0)).save(here / "tokenizer")


def llm(here: Path) -> None:
    """The bundle of a text model."""
    lines = [
        f"a {size} {colour} circle is in the top left {i}"
        for size in ("big", "small")
        for colour in "rgb"
        for i in range(9)
    ]
    test_from_llm.write(here / "llm", TextTokenizer.train(lines, 300))


def qwen(here: Path) -> None:
    """A Qwen as transformers writes it."""
    table = tables.qwen()
    sizes = Sizes(table.size)
    folder = here / "Qwen2.5-1.5B"
    formats.save(folder, drawn(transformer_shapes(sizes, qk_norm="rms"), 0))
    more = {"head_dim": sizes.H, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
    tables.write_json(
        folder,
        config=formats._config("Qwen3ForCausalLM", "qwen3", table, sizes, "float32", **more),
        tokenizer=table.split({"type": "NFC"}),
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"},
    )


def emu3(here: Path) -> None:
    """Emu3-Chat in transformers' form, with its vision tokenizer."""
    config, _, params, kept = test_movq.imported()
    vision = movq_weights.to_published(config, params, kept, "emu3_hf")
    table = tables.emu3(codes=config.codes, placeholder="<image>")
    sizes = Sizes(table.size)
    text = drawn(transformer_shapes(sizes), 0)
    folder = here / "DOWNLOAD"
    tensors = {f"text_model.{name}": x for name, x in text.items()}
    tensors |= {f"model.vqmodel.{name}": np.asarray(x, order="C") for name, x in vision.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    said = formats._config("Emu3ForCausalLM", "emu3_text_model", table, sizes, "float32")
    tables.write_json(
        folder,
        config={
            "architectures": ["Emu3ForConditionalGeneration"],
            "model_type": "emu3",
            "text_config": said | {"max_position_embeddings": 131072, "rope_theta": 1e6},
            "vq_config": settings_of(config, "emu3"),
            "vocabulary_map": table.vocabulary,
        },
        tokenizer=table.byte_level(),
    )


HAS: dict[str, Callable[[Path], None]] = {
    each.__name__: each for each in (pairs, emu3, sets, words, results, tokenizer, llm, qwen)
}


@contextlib.contextmanager
def machine(argv: Sequence[str]) -> Iterator[None]:
    """Lets JAX see one device, or eight of those that are faked here if the command asks for a mesh of eight."""
    count = 8 if any(word.startswith("--config.mesh.") and word.endswith("=8") for word in argv) else 1
    with pytest.MonkeyPatch.context() as patch:
        for name in ("devices", "local_devices"):
            found = getattr(jax, name)()[:count]
            patch.setattr(jax, name, lambda *_, found=found, **__: found)
        yield
