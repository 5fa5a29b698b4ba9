"""Learning from rewards and best of n, from the command line."""

from __future__ import annotations

import contextlib
import io
import json

import pytest

from ar_unified.cli.main import main
from ar_unified.language.document import ImagePart
from ar_unified.metrics import read_metrics
from tests.cli.conftest import command, refused

REWARD = {
    "training__objective": "reward",
    "training__steps": 6,
    "training__batch_size": 8,
    "training__checkpoint_every": 2,
    "training__log_every": 1,
    "training__warmup_steps": 0,
    "reward__group_size": 4,
    "reward__function": "tests.cli.test_rewards:bright",
}


def bright(prompt, answer):
    """A reward: the mean of an image, or the length of a text. It does not see the document's own answer."""
    (part, *_) = answer.parts
    return float(part.pixels.mean() / 255) if isinstance(part, ImagePart) else float(len(part.text))


@pytest.mark.slow
def test_a_training_by_rewards_and_the_best_of_its_samples(folder, tmp_path):
    for verb in ("tokenizer", "train"):
        assert main(command(verb, folder, tmp_path / "run", **REWARD)) == 0
    rows = read_metrics(tmp_path / "run" / "model" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["sampler_trainer/max"] < 1e-4 and row["groups/failed"] == 0 for row in rows)
    assert not (tmp_path / "run" / "data").exists()  # documents are only prompts here, so none are prepared

    requests = tmp_path / "requests.jsonl"
    requests.write_text("".join(json.dumps({"prompt": f"a {c} circle", "id": c}) + "\n" for c in ("red", "blue")))
    more = [
        "--requests",
        str(requests),
        "--output",
        str(tmp_path / "out"),
        "--n",
        "3",
        "--keep-best",
        REWARD["reward__function"],
    ]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert (
            main([*command("sample", folder, tmp_path / "run", **REWARD, sampling__image__temperature=1.0), *more]) == 0
        )
    best = [json.loads(line) for line in (tmp_path / "out" / "best.jsonl").read_text().splitlines()]
    assert [row["id"] for row in best] == ["red", "blue"] and "best of n: 2 chosen" in said.getvalue()
    for row in best:
        assert row["reward"] == max(row["rewards"].values()) and sorted(row["rewards"]) == ["0", "1", "2"]
    for line in (tmp_path / "out" / "preferences.jsonl").read_text().splitlines():
        pair = json.loads(line)
        assert pair["prompt"].endswith("circle") and (tmp_path / "out" / pair["chosen"][0]["image"]).exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            dict(reward__function="shape"),
            r"config.reward.function: expected the name of a shipped reward.*did you mean 'shapes'",
        ),
        (dict(reward__function="tests.cli.test_rewards:brigt"), "no function of that name; did you mean 'bright'"),
        (dict(reward__function=""), "config.reward.function: expected the name of a shipped reward.*found none"),
        (dict(reward__function="scores:x.jsonl"), "no scores for the answers that a training draws"),
        (dict(reward__group_size=3), r"config.reward.batch_size: .*expected a multiple of 3"),
        (
            dict(reward__minibatches=4),
            "config.training.steps: expected a multiple of the 4 steps for one round of sampling",
        ),
        (dict(reward__on_error="ignore"), "config.reward.on_error: expected one of skip, stop"),
        (dict(reward__temperature=0.0), "config.reward.temperature: expected more than 0"),
        (dict(training__objective="rewards"), "config.training.objective: expected one of .*did you mean 'reward'"),
    ],
)
def test_what_cannot_be_trained_by_rewards_is_refused_before_anything_runs(folder, tmp_path, changes, words):
    refused(command("train", folder, tmp_path, **REWARD | changes), words)
    assert not (tmp_path / "model").exists()
