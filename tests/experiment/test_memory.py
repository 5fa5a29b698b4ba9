"""Work that runs out of memory: the advice names what this work reads, and nothing that is at its limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest
from ar_tokenizers.image.tokenizer import ImageTokenizer

from ar_unified.errors import MORE_MEMORY, RunError, UserError, explain, saving_memory
from ar_unified.experiment import config as configs
from ar_unified.experiment import memory
from ar_unified.experiment.experiment import STAGES, Experiment
from ar_unified.experiment.start import by_first_process
from ar_unified.workdir import Workdir

YNNPACK = RuntimeError("INTERNAL: YNNPACK operation failed: error")


def config(**changes: Any) -> Any:
    made = configs.defaults()
    made.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return made


@pytest.mark.parametrize(
    "work, named, others",
    [
        ("text_tokenizer", ["text_tokenizer.max_bytes"], ["accumulation", "sampling", "model.", "loss."]),
        ("image_tokenizer", ["image_tokenizer.accumulation (now 1)", "data.image_size"], ["model.", "training."]),
        ("data", ["image_tokenizer.accumulation (now 1)"], ["model.", "training.", "sampling."]),
        ("model", ["model.remat=full", "training.accumulation (now 1)", "loss.chunk"], ["sampling.", "image"]),
        ("samples", ["sampling.batch_size", "image_tokenizer.accumulation"], ["model.", "training.", "loss."]),
        ("tokenizer_evaluation", ["image_tokenizer.accumulation"], ["model.", "training.", "sampling."]),
        ("evaluation", ["sampling.batch_size", "image_tokenizer.accumulation"], ["model.", "training.", "loss."]),
        (memory.REQUESTS, ["sampling.batch_size"], ["model.", "training.", "another --workdir"]),
        (memory.EVALUATION_OF_BUNDLE, ["sampling.batch_size", "training.accumulation", "loss.chunk"], ["model."]),
    ],
)  # fmt: skip
def test_each_work_is_told_what_it_reads(work: str, named: list[str], others: list[str]) -> None:
    told = memory.advice(work, config())
    assert all(word in told for word in named) and not [word for word in others if word in told], told


def test_every_stage_has_advice() -> None:
    assert not [stage for stage in STAGES if memory.advice(stage, config()) == MORE_MEMORY]
    assert memory.advice("export", config()) == MORE_MEMORY


def test_what_is_at_its_limit_or_decides_the_result_is_not_offered() -> None:
    least = config(model__remat="full", training__accumulation=16, loss__chunk=128)
    told = memory.advice("model", least)
    assert not [key for key in ("model.remat", "training.accumulation", "loss.chunk") if key in told]
    assert "training.batch_size" in told
    rows = 64 // jax.device_count()
    for most in (64, rows):  # each device has a row of a microbatch
        assert "accumulation" not in memory.advice("image_tokenizer", config(image_tokenizer__accumulation=most))
    assert "accumulation" in memory.advice("image_tokenizer", config(image_tokenizer__accumulation=rows // 2))
    assert "accumulation" not in memory.advice("image_tokenizer", config(image_tokenizer__quantizer="lfq"))
    assert "image_tokenizer" not in memory.advice("samples", config(image_tokenizer__steps=0))  # text alone
    assert "sampling.batch_size" in memory.advice("model", config(training__objective="reward"))


@pytest.mark.parametrize("error", [MemoryError(), YNNPACK, OSError(12, "Cannot allocate memory")])
def test_a_stage_that_runs_out_says_what_helps_it(tmp_path: Path, error: Exception) -> None:
    @by_first_process
    def encode(experiment: Experiment) -> None:
        experiment.stage("data", "data")
        raise error

    with pytest.raises(RunError, match="^out of memory: .*a larger image_tokenizer.accumulation") as caught:
        encode(Experiment(config(), Workdir(tmp_path)))
    assert explain(caught.value) == (str(caught.value), 3) and not (tmp_path / "data").exists()


def test_work_that_is_no_stage_keeps_its_own_advice(tmp_path: Path) -> None:
    @by_first_process
    def score(experiment: Experiment) -> None:
        raise YNNPACK

    with pytest.raises(RunError, match="of these documents"), saving_memory(lambda: "Fewer of these documents"):
        score(Experiment(config(), Workdir(tmp_path)))


def test_an_error_that_says_nothing_of_memory_is_left_as_it_is() -> None:
    for error in (
        ValueError("RESOURCE_EXHAUSTED"),
        RuntimeError("YNNPACK operation failed: unsupported"),
        UserError("no"),
    ):
        with pytest.raises(type(error)), saving_memory(lambda: "Never"):
            raise error


def test_accumulation_divides_the_images_that_are_encoded_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "image_tokenizer").mkdir()
    (tmp_path / "image_tokenizer" / "config.json").write_text("{}")
    asked = []
    monkeypatch.setattr(ImageTokenizer, "load", lambda folder, batch_size: asked.append(batch_size))
    for parts in (1, 8, 128):
        _ = Experiment(config(image_tokenizer__accumulation=parts), Workdir(tmp_path)).image_tokenizer
    assert asked == [64, 8, 1]
