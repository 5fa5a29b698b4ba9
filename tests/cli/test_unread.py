"""If nothing would read an argument in this use of a verb, the argument is refused by name before anything is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from ar_unified import bundle
from ar_unified.cli.main import main
from tests import bundles
from tests.cli.conftest import refused
from tests.interop import formats
from tests.published_bundles import parts

HERE = ["--config", "none.py", "--workdir", "none"]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["export", "--workdir", "none", "--output", "out", "--to", "meta"], "--to does nothing without --from"),
        (["export", "--from", "b", "--output", "out", "--processes", "2"], "--processes does nothing with --from"),
        (["sample", *HERE, "--links"], "--links does nothing without --requests"),
        (["sample", *HERE, "--part", "0/2"], "--part does nothing without --requests"),
        (["sample", *HERE, "--output", "out"], "--output does nothing without --requests"),
        (["sample", *HERE, "--output", "out", "--layout", "geneval", "--part", "1/2"], "--part does nothing"),
        (["evaluate", *HERE, "--links"], "--links does nothing without --images"),
        (["validate", "none", "--workdir", "w"], "--workdir does nothing with a folder"),
        (["validate", "none", "--config.seed=1"], "--config.seed=1 does nothing without --config"),
        (["validate", "--config", "none.py", "--links"], "--links does nothing with --config"),
    ],
)
def test_it_is_refused(argv: list[str], words: str) -> None:
    refused(argv, words)


def test_a_licence_stands_in_the_card_of_our_own_and_is_refused_where_there_is_none(tmp_path: Path) -> None:
    bundles.write(tmp_path / "own")
    own = ["export", "--from", str(tmp_path / "own"), "--output", str(tmp_path / "out"), "--license", "apache-2.0"]
    assert main(own) == 0
    assert (tmp_path / "out" / "README.md").read_text().startswith('---\nlicense: "apache-2.0"\n')
    bundle.write(tmp_path / "theirs", **parts("chameleon"))
    theirs = ["export", "--from", str(tmp_path / "theirs"), "--output", str(tmp_path / "back")]
    refused([*theirs, "--license", "mit"], "--license does nothing for published weights in their own form")
    refused([*theirs, "--to", "meta", "--shard-mib", "9"], "--shard-mib does nothing with --to meta")
    assert not (tmp_path / "back").exists()


def test_what_an_import_reads_nothing_of_is_refused(tmp_path: Path) -> None:
    formats.meta(tmp_path / "download", count=1)
    tokenizer = tmp_path / "download" / "tokenizer"
    beside = ["--text", str(tokenizer), "--image", str(tokenizer / "vqgan.safetensors")]
    files = ["import", "--from", str(tmp_path / "download" / "models" / "7b"), "--output", str(tmp_path / "b"), *beside]
    refused([*files, "--as", "chameleon", "--rope-theta", "1e4"], "--rope-theta does nothing for .*7b")
    text = formats.lwm(tmp_path / "LWM-Text-256K-Jax", vision=False)
    (text / "config.json").write_text('{"num_attention_heads": 4}')
    files = ["import", "--from", str(text), "--as", "lwm", "--output", str(tmp_path / "b")]
    refused([*files, "--image", str(tokenizer)], "--image does nothing")
    refused([*files, "--size", "8x8"], "--size does nothing")
    assert not (tmp_path / "b").exists() and main(files) == 0
