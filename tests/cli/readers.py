"""Small versions of what a reader already has before the first command of a page: files, and a machine."""

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
from ar_tokenizers.image import autoencoder, movq_weights, published
from ar_tokenizers.image.config import AutoencoderConfig
from ar_tokenizers.image.published import settings_of
from ar_tokenizers.image.tokenizer import ImageTokenizer
from ar_tokenizers.text import TextTokenizer
from safetensors.numpy import save_file

from ar_unified.bundle import Bundle
from ar_unified.model.lora import LoraConfig
from tests import adapters
from tests.bundles import fresh
from tests.cli import test_from_llm, test_mixture, test_text_alone
from tests.cli.conftest import ROOT
from tests.interop import formats, tables, test_conversion
from tests.interop.weights import Sizes, drawn, transformer_shapes
from tests.tokenizers import test_movq, test_published_image


def pairs(here: Path) -> None:
    """pairs.jsonl: pairs of pictures and of texts. Its images are those of `mine`."""
    rows: list[dict[str, Any]] = []
    for i in range(0, 38, 2):
        right, wrong = ([{"type": "image", "image": f"mine/{j}.png"}] for j in (i, i + 1))
        rows.append({"prompt": f"Draw number {i}.", "chosen": right, "rejected": wrong})
        rows.append({"prompt": [*right, {"type": "text", "text": "What is it?"}], "chosen": "A.", "rejected": "B."})
    (here / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def sets(here: Path) -> None:
    """The five sets of experiments/mixture.py, and three that docs/data.md names: a folder of `mine`, a tar, texts."""
    test_mixture.make(here / "sets")
    shutil.copytree(here / "mine", here / "sets" / "photos", ignore=shutil.ignore_patterns("*.txt"))
    (here / "sets" / "shards").mkdir()
    with tarfile.open(here / "sets" / "shards" / "000.tar", "w") as tar:
        for i in range(40):
            tar.add(here / "mine" / f"{i}.png", f"{i:03}.png")
            tar.add(here / "mine" / "en.txt", f"{i:03}.txt")
    (here / "sets" / "books").mkdir()
    for i in range(20):
        (here / "sets" / "books" / f"{i}.txt").write_text(f"A square in chapter {i}.\n" * 20)


def book(here: Path) -> None:
    """book.txt, a text of 50 kB."""
    random = np.random.default_rng(0)
    some = ["".join(random.choice([*"etaoinshrdlu"], 7)) for _ in range(300)]
    lines = [" ".join(random.choice(some, 12)) for _ in range(500)]
    (here / "book.txt").write_text("\n".join(lines))


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


def adapter(here: Path) -> None:
    """An adapter of the reader's bundle."""
    adapters.write(here / "adapters" / "sketch", Bundle(here / "bundle"), LoraConfig(rank=2, alpha=4.0))


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


def chameleon(here: Path) -> None:
    """Chameleon in transformers' form; its VQGAN, pickled and as tensors; the tokenizer of Meta's download; and one
    trained here that has such a network."""
    table = tables.chameleon()
    sizes = Sizes(table.size)
    tensors = drawn(transformer_shapes(sizes, qk_norm="layer", groups=(sizes.N, sizes.K)), 0)
    formats.chameleon_twin(here / "Chameleon-7b-hf", tensors, table, sizes)
    tables.write_json(
        here / "Chameleon-7b-hf",
        tokenizer=table.byte_level(),
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"},
    )
    formats.chameleon_tokenizer(here / "vqgan")
    pickled(here / "vqgan.ckpt", {"state_dict": formats.vqgan()})
    formats.chameleon_tokenizer(here / "Chameleon" / "tokenizer")
    (here / "Chameleon" / "tokenizer" / "vqgan.safetensors").unlink()
    shutil.copy(here / "vqgan.ckpt", here / "Chameleon" / "tokenizer")
    config = test_published_image.CHAMELEON_HF
    ImageTokenizer(config, fresh(autoencoder.init, config, 0)).save(here / "workdirs" / "vqgan" / "image_tokenizer")


def llamagen(here: Path) -> None:
    """LlamaGen's VQ-16 with its number of codes but fewer levels, pickled and as tensors."""
    config = published.config_of("llamagen_vq", {}, [f"encoder.conv_blocks.{i}." for i in range(len(LEVELS))])
    tensors = published.to_published(ImageTokenizer(config, fresh(autoencoder.init, config, 0)), "llamagen")
    pickled(here / "vq_ds16_t2i.pt", {"model": tensors})
    save_file(tensors, here / "vq_ds16_t2i.safetensors")


LEVELS = (1, 2, 2)


def fewer_levels(patch: pytest.MonkeyPatch) -> None:
    """LlamaGen's network of three levels is one of its own for a while; VQ-8 has four and VQ-16 five."""
    small = dict(factor=4, width=32, multipliers=LEVELS, blocks=(1, 1, 1))
    patch.setitem(published._LEVELS, len(LEVELS), published._LEVELS[5] | small)


def pickled(path: Path, tree: dict[str, Any]) -> None:
    """A torch file of these trees of arrays."""
    numbers = {f"{i}": x for i, x in enumerate(x for part in tree.values() for x in part.values())}
    keys = iter(numbers)

    def tensor(x: np.ndarray) -> object:
        strides = tuple(stride // x.itemsize for stride in np.ascontiguousarray(x).strides)
        kind = {"float32": "FloatStorage", "int64": "LongStorage"}[x.dtype.name]
        return test_conversion.tensor(next(keys), x.shape, strides, size=x.size, kind=kind)

    named = {kind: {name: tensor(x) for name, x in part.items()} for kind, part in tree.items()}
    test_conversion.torch_file(path, named, numbers)


HAS: dict[str, Callable[[Path], None]] = {
    each.__name__: each
    for each in (pairs, emu3, sets, book, words, results, tokenizer, adapter, llm, qwen, chameleon, llamagen)
}


@contextlib.contextmanager
def machine(argv: Sequence[str]) -> Iterator[None]:
    """Lets JAX see one device, or all eight that are faked here if the command asks for a mesh or a target of eight."""
    count = 8 if any(word.startswith("--config.mesh.") and word.endswith("=8") for word in argv) else 1
    if "h200:8" in argv:
        count = 8
    with pytest.MonkeyPatch.context() as patch:
        for name in ("devices", "local_devices"):
            found = getattr(jax, name)()[:count]
            patch.setattr(jax, name, lambda *_, found=found, **__: found)
        yield
