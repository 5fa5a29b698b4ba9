"""A small folder of captions, questions and stories, and settings with which `experiments/folder.py` runs on it in
seconds."""

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ar_unified.cli.main import main
from ar_unified.data import scenes

ROOT = Path(__file__).resolve().parents[2]

SMALL = {
    "data.image_size": "(32,32)",
    "data.max_tokens": 160,
    "text_tokenizer.vocab_size": 320,
    "image_tokenizer.crop": 32,
    "image_tokenizer.width": 8,
    "image_tokenizer.blocks": "(0,0,1)",
    "image_tokenizer.steps": 12,
    "image_tokenizer.batch_size": 8,
    "model.d_model": 32,
    "model.n_layers": 2,
    "model.n_heads": 2,
    "model.n_kv_heads": 2,
    "model.head_dim": 16,
    "model.d_mlp": 64,
    "training.steps": 24,
    "training.warmup_steps": 4,
    "training.batch_size": 8,
    "training.sequence_length": 160,
    "training.code_embedding_init": "codebook",
    "training.log_every": 4,
    "training.validate_every": 12,
    "training.checkpoint_every": 5,
    "sampling.max_length": 192,
    "sampling.batch_size": 8,
    "evaluation.limit": 2,
}


def command(verb: str, folder: Path, workdir: Path, **changes: object) -> list[str]:
    """The arguments of `ar-unified` for the small run, without the program's name."""
    settings = {**SMALL, **{key.replace("__", "."): value for key, value in changes.items()}}
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    config = f"{ROOT / 'experiments' / 'folder.py'}:path={folder}"
    return [verb, "--config", config, "--workdir", str(workdir), *overrides]


def refused(argv: list[str], words: str, status: int = 2) -> None:
    """`ar-unified` ends with this status and one sentence on stderr that matches `words`; no traceback."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main(argv) == status, said.getvalue()
    assert re.search(words, said.getvalue()) and "Traceback" not in said.getvalue(), said.getvalue()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """captions.jsonl, vqa.jsonl and docs.jsonl over 40 images of 32 x 32 to 48 x 32 pixels."""
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict]] = {"captions": [], "vqa": [], "docs": []}
    for i in range(40):
        scene = scenes.sample_scene(rng, "train")
        name = f"{i}.png"
        pixels = scenes.render(scene, 32)
        Image.fromarray(np.pad(pixels, ((0, 0), (0, 16 * (i % 2)), (0, 0)), mode="edge")).save(root / name)
        text = scenes.caption(rng, scene)
        question, answer = scenes.question(rng, scene, "train")
        rows["captions"].append({"image": name, "text": text})
        rows["vqa"].append({"image": name, "question": question, "answer": answer})
        if i % 4 == 0:
            segments = [{"type": "text", "text": text}, {"type": "image", "image": name}]
            rows["docs"].append({"segments": segments})
    for kind, found in rows.items():
        (root / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return root
