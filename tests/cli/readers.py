"""What a reader of the pages already has before the first command of a page, small: files, and a machine."""

from __future__ import annotations

import contextlib
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ar_tokenizers.image import autoencoder, movq_weights
from ar_tokenizers.image.config import PRESETS, AutoencoderConfig
from ar_tokenizers.image.published import settings_of, to_published
from ar_tokenizers.image.tokenizer import ImageTokenizer
from ar_tokenizers.text import TextTokenizer
from safetensors.numpy import save_file

from tests.bundles import fresh
from tests.cli import test_from_llm, test_mixture, test_text_alone
from tests.cli.conftest import ROOT
from tests.interop import formats, tables, test_conversion
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


def own_sets(here: Path) -> None:
    """Those, and three more: a folder of rows, tars, and texts."""
    sets(here)
    shutil.copytree(here / "mine", here / "sets" / "photos")
    shutil.copytree(here / "sets" / "text" / "udhr", here / "sets" / "books")
    (here / "sets" / "shards").mkdir()
    with tarfile.open(here / "sets" / "shards" / "000.tar", "w") as tar:
        for i, row in enumerate(map(json.loads, (here / "mine" / "captions.jsonl").read_text().splitlines())):
            (here / "text.txt").write_text(row["text"])
            tar.add(here / "text.txt", f"{i:03d}.txt")
            tar.add(here / "mine" / row["image"], f"{i:03d}.png")


def words(here: Path) -> None:
    """words.py, an experiment with text alone, and its texts; prompts for it."""
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


def chameleon(here: Path) -> None:
    """A Chameleon in transformers' form, and its VQGAN."""
    folder = here / "Chameleon-7b-hf"
    formats.lumina_1(here / "other", folder)
    tables.write_json(folder, tokenizer=tables.chameleon().byte_level())
    formats.chameleon_tokenizer(here / "vqgan")


NARROW = PRESETS["taming_f16"] | dict(width=32, multipliers=(1, 1, 1, 1, 1), blocks=(1, 1, 1, 1, 1))


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


def vqgan(here: Path) -> None:
    """An image tokenizer of experiments/image_tokenizers/vqgan.py, with a narrow network, that was never trained."""
    config = AutoencoderConfig.from_dict(NARROW | dict(quantizer="vq", codes=64, code_dim=8, z_channels=32))
    ImageTokenizer(config, fresh(autoencoder.init, config, 0)).save(here / "workdirs" / "vqgan" / "image_tokenizer")


def llamagen(here: Path) -> None:
    """LlamaGen's pickled VQ-16, with a narrow network."""
    config = AutoencoderConfig.from_dict(NARROW | dict(quantizer="vq", codes=16384, code_dim=8, z_channels=256))
    tensors = to_published(ImageTokenizer(config, fresh(autoencoder.init, config, 0)), "llamagen")
    tree, storages = {}, {}
    for i, (name, x) in enumerate(tensors.items()):
        strides = tuple(each // x.itemsize for each in np.ascontiguousarray(x).strides)
        tree[name] = test_conversion.tensor(str(i), x.shape, strides, size=x.size)
        storages[str(i)] = np.ascontiguousarray(x)
    test_conversion.torch_file(here / "vq_ds16_t2i.pt", {"model": tree}, storages)


HAS: dict[str, Callable[[Path], None]] = {
    each.__name__: each
    for each in (pairs, emu3, sets, own_sets, words, results, tokenizer, llm, qwen, chameleon, vqgan, llamagen)
}


@contextlib.contextmanager
def machine(argv: Sequence[str]) -> Iterator[None]:
    """A machine with one device, or with all that are faked here if the command says so by a mesh of eight."""
    count = 8 if any(word.startswith("--config.mesh.") and word.endswith("=8") for word in argv) else 1
    with pytest.MonkeyPatch.context() as patch:
        for name in ("devices", "local_devices"):
            found = getattr(jax, name)()[:count]
            patch.setattr(jax, name, lambda *_, found=found, **__: found)
        yield
