"""LPIPS and rFID of a tokenizer, with untrained networks."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from ar_tokenizers.image import inception, lpips
from safetensors.numpy import save_file

from ar_unified.evaluation import networks
from ar_unified.evaluation.tokenizer import evaluate_tokenizer
from tests.evaluation.test_tokenizer import SIZE, Album, Greys, exact


def weights(shapes, path):
    rng = np.random.default_rng(0)
    positive = ("running_var", "lin", "bn.weight")
    made = {
        name: np.float32(np.abs(x) + 1 if any(word in name for word in positive) else x)
        for name, shape in shapes.items()
        for x in [rng.normal(0, (2 / max(np.prod(shape[1:]), 50)) ** 0.5, shape)]
    }
    save_file(made, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_lpips_and_rfid_stand_beside_the_hash_of_their_weights(tmp_path):
    files = {"LPIPS": tmp_path / "lpips.safetensors", "inception": tmp_path / "inception.safetensors"}
    digests = {"LPIPS": weights(lpips.SHAPES, files["LPIPS"])}
    digests["inception"] = weights(inception.SHAPES, files["inception"])
    found = networks.load_networks({name: str(path) for name, path in files.items()})
    source = Album("a", exact(4))
    same, _ = evaluate_tokenizer(Greys(), [source], size=SIZE, **found)
    assert same["LPIPS"] == 0 and same["rFID"] == pytest.approx(0, abs=1e-3) and same["weights"] == digests
    other, _ = evaluate_tokenizer(Greys(drift=12), [source], size=SIZE, **found)
    assert other["LPIPS"] > 0 and other["rFID"] > 1e-3
    assert networks.load_networks({"LPIPS": "", "inception": ""})["weights"] == {}
