"""`ar-unified evaluate --from BUNDLE`: on the user's own documents, without a workdir."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ar_unified
from ar_unified import bundle
from ar_unified.cli import evaluate
from ar_unified.cli.main import main
from ar_unified.data.sources import open_source
from ar_unified.language.vocabulary import Role
from tests import bundles, published_bundles
from tests.cli.conftest import refused
from tests.cli.test_published import command

FEW = ("--config.evaluation.limit=1", "--config.training.batch_size=8", "--config.sampling.batch_size=8")
LOSSES = {"loss", "loss/role/text", "loss/role/image", "loss/task/text_to_image", "bits_per_text_byte", "fill"}


def write(folder: Path, rows: list[dict[str, Any]], file: str = "captions.jsonl") -> Path:
    """Documents in a folder beside two images, grey.png and dark.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, shade in (("grey", 1), ("dark", 3)):
        Image.fromarray(bundles.grey() // shade).save(folder / f"{name}.png")
    (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(source: Path, data: Path, output: Path, *more: str) -> list[str]:
    return ["evaluate", "--from", str(source), "--data", str(data), "--output", str(output), *FEW, *more]


def found(output: Path) -> dict[str, Any]:
    return json.loads((output / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.write(tmp_path_factory.mktemp("bundle") / "tiny").folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"image": f"{name}.png", "text": "A small star."} for name in ("grey", "dark", "gone")]
    return write(tmp_path_factory.mktemp("data"), rows)


def test_a_bundle_is_evaluated_on_a_folder(
    own: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(arguments(own, data, out)) == 0
    said = capsys.readouterr().out
    assert "3 items -> 2 documents" in said and f"{out}/evaluation.json\n{out}/report.html" in said
    numbers = found(out)
    assert numbers.keys() >= {"parse_rate", "caption_exact", "counts", "validation", "tokenizer"}
    assert numbers["parse_rate"] == 1 and numbers["validation"].keys() >= LOSSES
    assert numbers["tokenizer"]["validation"]["images"] == 1 and (out / "tokenizer_evaluation/validation.png").exists()
    report = (out / "report.html").read_text()
    assert f"sha256 {bundle.Bundle(own).hash[:12]}" in report and "</html>" in report
    (left_out,) = map(json.loads, (out / "skipped.jsonl").read_text().splitlines())
    assert left_out["origin"].endswith("captions.jsonl:3") and left_out["kind"] == "missing_image"
    left = {"evaluation.json", "report.html", "skipped.jsonl", "tokenizer_evaluation"}
    assert {path.name for path in out.iterdir()} == left, "tokens of the data are not kept"
    refused(arguments(own, data, out), f"{out}: something is there already.*name another --output")


@pytest.mark.parametrize("kind", ["own", pytest.param("chameleon", marks=pytest.mark.slow), "emu3"])
def test_its_losses_are_what_the_model_says_of_the_documents(
    kind: str, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is one document, so rows and epochs do not matter. Other code computes the same number."""
    source = own if kind == "own" else bundle.write(tmp_path / kind, **published_bundles.parts(kind)).folder
    text, image = {"type": "text", "text": "A small red star."}, {"type": "image", "image": "grey.png"}
    folder = write(tmp_path / "data", [{"segments": [text, image]}], "docs.jsonl")
    assert main(arguments(source, folder, tmp_path / "out", "--config.evaluation.limit=1")) == 0, capsys.readouterr()
    losses = found(tmp_path / "out")["validation"]
    model = ar_unified.load(source)
    encoded = model.grammar.encode(model._scored(open_source(dict(kind="folder", path=str(folder)))[0]))
    logits, targets = model.logits(encoded.tokens[None, :-1])[0].astype(np.float64), encoded.tokens[1:]
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[:, None], -1)[:, 0]
    learned, roles = ~encoded.unlearned[1:], encoded.roles[1:]
    expected = {"loss": nll[learned].mean()}
    for role in Role:
        if (of_role := learned & (roles == role)).any():
            expected[f"loss/role/{role.name.lower()}"] = nll[of_role].mean()
    assert {"loss/role/text", "loss/role/image", "loss/role/control"} <= expected.keys()
    for name, value in expected.items():
        assert losses[name] == pytest.approx(value, abs=2e-5), name
    assert losses["loss/task/interleaved"] == losses["loss"]
    assert losses["bits_per_text_byte"] == pytest.approx(
        nll[learned & (roles == Role.TEXT)].sum() / np.log(2) / len("A small red star."), abs=2e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["own", pytest.param("chameleon", marks=pytest.mark.exhaustive), "emu3"])
def test_its_numbers_are_those_of_the_workdir_that_it_comes_from(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "own":
        bundles.write(tmp_path / kind)
    few = ("evaluation.limit=2", "sampling.batch_size=8")
    for verb in ("tokenizer", "prepare", "train", "evaluate"):
        assert main(command(verb, kind, folder, tmp_path, *few)) == 0, capsys.readouterr()
    assert main(["export", "--workdir", str(tmp_path / "w"), "--output", str(tmp_path / "tuned")]) == 0
    _, _, config, _, _, *settings = command("evaluate", kind, folder, tmp_path, *few)
    given = ["--from", str(tmp_path / "tuned"), "--config", config, "--output", str(tmp_path / "out")]
    assert main(["evaluate", *given, *settings]) == 0, capsys.readouterr()
    there = json.loads((tmp_path / "w" / "evaluation.json").read_text())
    assert there["validation"].keys() >= LOSSES and there["tokenizer"] and there["counts"]["parse_rate"]
    assert found(tmp_path / "out") == there


def test_one_that_draws_no_images_is_asked_for_words(own: Path, tmp_path: Path) -> None:
    mute = bundles.write_without_decoder(tmp_path / "mute").folder
    question = {"image": "grey.png", "question": "What is it?", "answer": "A star."}
    folder = write(tmp_path / "data", [question], "vqa.jsonl")
    write(folder, [{"image": "dark.png", "text": "A small star."}])
    assert main(arguments(mute, folder, tmp_path / "out")) == 0
    numbers = found(tmp_path / "out")
    assert numbers["counts"] == {"parse_rate": 2, "image_to_text_exact": 1, "caption_exact": 1}
    assert "not draw them" in numbers["note"] and numbers["validation"].keys() >= LOSSES and not numbers["tokenizer"]
    assert not (tmp_path / "out" / "tokenizer_evaluation").exists()


def test_one_of_text_alone_reads_texts_and_refuses_images(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = bundles.write(tmp_path / "text", "none").folder
    rows = [{"segments": [{"type": "text", "text": "A small blue star in the top left."}]}]
    folder = write(tmp_path / "texts", rows, "docs.jsonl")
    assert main(arguments(text, folder, tmp_path / "out")) == 0, capsys.readouterr()
    numbers = found(tmp_path / "out")
    assert numbers["validation"]["bits_per_text_byte"] > 0 and not numbers["tokenizer"]
    refused(arguments(text, data, tmp_path / "no"), f"bundle {text}: expected text alone, found an image")
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_evaluated_is_refused_and_nothing_is_left(own: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(arguments(data, data, out), f"{data}: expected a bundle, which has a bundle.json; it has none")
    refused(arguments(tmp_path / "none", data, out), "none: expected the folder of a bundle, found no such folder")
    refused(arguments(own, tmp_path / "none", out), f"--data {tmp_path}/none: .*none")
    (tmp_path / "empty").mkdir()
    refused(arguments(own, tmp_path / "empty", out), f"--data {tmp_path}/empty: ")
    gone = write(tmp_path / "gone", [{"image": "gone.png", "text": "A small star."}])
    refused(arguments(own, gone, out), "no document is left of source 'gone': 1 missing_image, first .*jsonl:1")
    pair = {"prompt": "A star.", "chosen": "Red.", "rejected": "Blue."}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    refused(arguments(own, tmp_path / "pairs.jsonl", out), "found preference pairs: `ar-unified score --from .*tiny`")
    refused(arguments(own, data, out, "--config.model.d_model=64"), "config.model.d_model: expected 32, as the bundle")
    refused(arguments(own, data, out, "--config.init=/else"), f"config.init: expected '{own}', the bundle .*'/else'")
    refused(arguments(own, data, out, "--config.training.batch_size=3"), "config.training.batch_size: .*3")
    probed = arguments(own, data, out, "--config.evaluation.tokenizer_probe_steps=2")
    refused(probed, "config.evaluation.tokenizer_probe_steps: expected 0, because the probe learns")
    bare = "from ar_unified.experiment.config import defaults\n\n\ndef get_config():\n    return defaults()\n"
    (tmp_path / "bare.py").write_text(bare)
    given = ["--from", str(own), "--config", str(tmp_path / "bare.py"), "--output", str(out)]
    refused(["evaluate", *given], "config.data.validation: expected documents to evaluate on, found none")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_what_goes_with_a_bundle_and_what_does_not(own: Path, data: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    of_bundle = ["evaluate", "--from", str(own)]
    refused(arguments(own, data, tmp_path / "out", "--workdir", out), "--workdir does nothing with --from")
    refused(arguments(own, data, tmp_path / "out", "--only", "tokenizer"), "--only does nothing with --from")
    refused(arguments(own, data, tmp_path / "out", "--processes", "2"), "--processes does nothing with --from")
    refused([*of_bundle, "--data", str(data)], "expected --output FOLDER with --from")
    refused([*of_bundle, "--output", out], "expected --data PATH or --config FILE.*found neither")
    refused([*of_bundle, "--output", out, "--config", "shapes", "--links"], "--links does nothing without --data")
    refused(
        ["evaluate", "--data", str(data), "--output", out],
        "expected --workdir DIR of a training, or --from BUNDLE; found neither",
    )
    of_workdir = ["evaluate", "--config", "shapes", "--workdir", out]
    refused([*of_workdir, "--data", str(data)], "--data does nothing with a workdir")
    refused([*of_workdir, "--output", out], "--output does nothing with a workdir")
    assert not list(tmp_path.iterdir())


def test_what_breaks_off_leaves_nothing(own: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "report.html")

    monkeypatch.setattr(evaluate, "write_report", full)
    refused(arguments(own, data, tmp_path / "out"), "No space left on device", status=3)
    assert not list(tmp_path.iterdir())
