"""A workdir whose config changes: which keys may change, how changes are recorded, and their effects."""

from __future__ import annotations

import functools
import operator
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from ar_unified.checkpoint import Checkpoints, restore_params, steps_in
from ar_unified.errors import UserError
from ar_unified.experiment import branch as branches
from ar_unified.experiment import config as configs
from ar_unified.experiment import settings
from ar_unified.experiment.branch import branch
from ar_unified.experiment.changes import COST, EXTENDS, LATER, Training, advised, changeable
from ar_unified.experiment.experiment import STAGES, Experiment
from ar_unified.experiment.facts import weights_hash
from ar_unified.manifests import ABSENT, flat
from ar_unified.metrics import read_metrics
from ar_unified.workdir import NotShared, StageMismatch, Workdir, read_json, write_json, write_text

KEYS = {"model": ("model", "loss", "training", "mesh"), "image_tokenizer": ("image_tokenizer", "mesh")}


def config(**changes: Any) -> ConfigDict:
    made = configs.defaults()
    for key, value in changes.items():
        _set(made, key.replace("__", "."), value)
    return made


def _set(made: ConfigDict, key: str, value: Any) -> None:
    *parts, name = key.split(".")
    with made.ignore_type():
        functools.reduce(operator.getitem, parts, made)[name] = value


def open_stage(folder: Path, name: str = "model", taken: int = 0, made: ConfigDict | None = None, **changes: Any):
    """The stage of an experiment after this many steps, without any trained arrays."""
    made = made or config(**changes)
    key = {"model": "training.steps", "image_tokenizer": "image_tokenizer.steps"}[name]
    wanted = functools.reduce(operator.getitem, key.split("."), made)
    steps = Training(key, wanted, lambda: [taken] if taken else [], "there", "" if name == "model" else "data")
    stage = Experiment(made, Workdir(folder)).stage(name, *KEYS[name], training=steps, manifest={"size": 9})
    if not stage.done and not (stage.folder / "metrics.jsonl").exists():
        write_text(stage.folder / "metrics.jsonl", "")  # an empty stage would be started again
    return stage


def history(folder: Path, name: str = "model") -> list[tuple[Any, ...]]:
    path = folder / name / "history.json"
    return [(row["kind"], row["step"], row["changed"]) for row in read_json(path)] if path.exists() else []


def test_every_key_that_may_change_is_a_key() -> None:
    known = dict(flat(configs.plain(configs.defaults())))
    for name in (*COST, *EXTENDS, "image_tokenizer.accumulation"):
        assert any(key == name or key.startswith(f"{name}.") for key in known), name
    assert not set(COST) & set(EXTENDS)


def test_a_key_that_came_later_is_not_missed_in_a_workdir_that_was_made_without_it(tmp_path: Path) -> None:
    open_stage(tmp_path, taken=3)
    started = tmp_path / "model" / "started.json"
    record = read_json(started)
    assert record["fingerprint"]["training"].pop("rates") == []
    write_json(started, record)
    open_stage(tmp_path, taken=3)
    assert history(tmp_path) == []
    open_stage(tmp_path, taken=3, training__rates=("layers=0.5",))
    assert history(tmp_path) == [("extended", 3, {"training.rates": [ABSENT, ["layers=0.5"]]})]


@pytest.mark.parametrize("name", ["model", "image_tokenizer"])
def test_each_key_of_a_training_costs_extends_or_is_refused(tmp_path: Path, name: str) -> None:
    """Each key is changed alone: every key that is in neither list affects the result."""
    plain = configs.plain(configs.defaults())
    keys = {key: value for part in KEYS[name] for key, value in flat(plain[part], part)}
    accepted: dict[str, set[str]] = {"cost": set(), "extended": set()}
    for i, (key, value) in enumerate(keys.items()):
        open_stage(tmp_path / str(i), name)
        made = config()
        _set(made, key, _other(value))
        try:
            open_stage(tmp_path / str(i), name, made=made)
        except StageMismatch as error:
            assert error.field == key and "What may change here: " in str(error)
            assert history(tmp_path / str(i), name) == []
        else:
            ((kind, step, changed),) = history(tmp_path / str(i), name)
            assert step == 0 and list(changed) == [key]
            accepted[kind].add(key)
    for kind, listed in (("cost", (*COST, "image_tokenizer.accumulation")), ("extended", EXTENDS)):
        assert accepted[kind] == {key for key in keys if key in listed or "mesh" in listed and key.startswith("mesh.")}


def _other(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case str():
            return f"{value}x"
        case list():
            return (*value, 0.5)
    return value + 1


def test_the_message_names_the_field_and_what_may_change(tmp_path: Path) -> None:
    open_stage(tmp_path)
    with pytest.raises(StageMismatch) as caught:
        open_stage(tmp_path, model__d_model=64, training__b2=0.5)
    assert caught.value.field == "model.d_model" and caught.value.exit_status == 2
    for words in (
        "model.d_model = 192, this run has 64",
        "--workdir",
        "model.remat",
        "loss.chunk",
        "training.log_every",
    ):
        assert words in str(caught.value)
    assert "training.steps" in str(caught.value) and "image_tokenizer" not in str(caught.value)


def test_the_story_of_an_interrupted_run_and_of_one_that_is_made_longer(tmp_path: Path) -> None:
    open_stage(tmp_path)
    changes: dict[str, Any] = dict(model__remat="full", training__accumulation=4, loss__chunk=256, mesh__fsdp=2)
    cheap = {"mesh.fsdp": [1, 2], "model.remat": ["none", "full"], "loss.chunk": [1024, 256]}
    cheap |= {"training.accumulation": [1, 4]}
    for _ in range(2):  # the second time is a restart after a kill, and records nothing new
        stage = open_stage(tmp_path, taken=400, **changes)
        assert not stage.done and history(tmp_path) == [("cost", 400, cheap)]
    assert not [key for key in dict(flat(stage.fingerprint)) if key in (*cheap, "training.log_every")]
    changes |= dict(training__decay_fraction=0.5, training__log_every=10)
    stage = open_stage(tmp_path, taken=600, **changes)
    decay = ("extended", 600, {"training.decay_fraction": [0.2, 0.5]})
    assert history(tmp_path)[1:] == [decay, ("cost", 600, {"training.log_every": [20, 10]})]
    stage.finish({"steps": 1000})
    weights = weights_hash(Experiment(config(), Workdir(tmp_path)))

    cheaper = changes | dict(training__log_every=50, model__remat="none")
    assert open_stage(tmp_path, taken=1000, **cheaper).done  # the training is finished, so cost settings do not matter
    assert len(history(tmp_path)) == 3 and weights_hash(Experiment(config(), Workdir(tmp_path))) == weights
    with pytest.raises(StageMismatch, match="is finished with 1000 steps.*config.training.steps of at least 1001"):
        open_stage(tmp_path, taken=1000, **changes | dict(training__decay_fraction=0.1))
    stage = open_stage(tmp_path, taken=1000, **changes | dict(training__steps=1500))
    assert not stage.done and history(tmp_path)[3:] == [("extended", 1000, {"training.steps": [1000, 1500]})]
    with pytest.raises(UserError, match="train"):
        Experiment(config(), Workdir(tmp_path)).trained()  # stages that use the model need the end of its training
    with pytest.raises(StageMismatch, match="has taken 1200 steps.*at least 1200 .*found 1100.*--branch"):
        open_stage(tmp_path, taken=1200, **changes | dict(training__steps=1100))
    assert not open_stage(tmp_path, taken=1200, **changes | dict(training__steps=1250)).done  # shorter, but not reached
    stage.finish({})
    assert weights_hash(Experiment(config(), Workdir(tmp_path))) != weights


def test_the_way_of_a_training_names_its_weights_and_its_cost_does_not(tmp_path: Path) -> None:
    """Three trainings end with the same settings: one unchanged, one whose cost settings changed, one that was made
    longer."""
    for name, changes in (("once", {}), ("cost", dict(model__remat="full")), ("longer", dict(training__steps=1500))):
        open_stage(tmp_path / name, **dict(training__steps=2000) | changes)
        open_stage(tmp_path / name, taken=1000, training__steps=2000).finish({})
    once, cost, longer = (
        weights_hash(Experiment(config(), Workdir(tmp_path / name))) for name in ("once", "cost", "longer")
    )
    assert once == cost != longer


def test_killed_while_it_is_reopened_it_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_stage(tmp_path).finish({})
    unlink = Path.unlink

    def die(path: Path, **options: Any) -> None:
        if path.name == "done.json":
            raise KeyboardInterrupt
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", die)
    with pytest.raises(KeyboardInterrupt):
        open_stage(tmp_path, taken=1000, training__steps=2000)
    monkeypatch.undo()
    assert not open_stage(tmp_path, taken=1000, training__steps=2000).done
    assert history(tmp_path) == [("extended", 1000, {"training.steps": [1000, 2000]})]


def test_a_finished_run_without_checkpoints_is_not_begun_from_nothing(tmp_path: Path) -> None:
    open_stage(tmp_path).finish({})
    with pytest.raises(UserError, match="there is no checkpoint in there"):
        open_stage(tmp_path, taken=0, training__steps=2000)
    assert (tmp_path / "model" / "done.json").exists()


@pytest.mark.parametrize("finished", [False, True])
def test_a_workdir_of_an_earlier_version_opens(tmp_path: Path, finished: bool) -> None:
    """The fingerprint has all of `model`, `loss` and `training`, but neither the mesh nor later keys."""
    plain = configs.plain(configs.defaults())
    for key in LATER:
        section, _, name = key.partition(".")
        plain[section].pop(name)
    del plain["training"]["keep_every"], plain["training"]["keep"]
    old = {key: plain[key] for key in ("model", "loss", "training")} | {"seed": 0, "manifest": {"size": 9}}
    write_json(tmp_path / "model" / ("done.json" if finished else "started.json"), {"fingerprint": old, "summary": {}})
    write_text(tmp_path / "model" / "metrics.jsonl", "")
    with pytest.raises(StageMismatch, match="model.d_model = 192"):
        open_stage(tmp_path, model__d_model=64)
    assert open_stage(tmp_path, taken=9, model__remat="dots").done == finished
    assert history(tmp_path) == ([] if finished else [("cost", 9, {"model.remat": ["none", "dots"]})])
    if finished:  # its samples still belong to it
        assert Experiment(config(), Workdir(tmp_path)).trained() == old


def test_an_image_tokenizer_goes_on_until_data_is_made_with_it(tmp_path: Path) -> None:
    open_stage(tmp_path, "image_tokenizer").finish({})
    with pytest.raises(StageMismatch, match="image_tokenizer.steps of at least 1001"):
        open_stage(tmp_path, "image_tokenizer", taken=1000, image_tokenizer__steps=900)
    assert not open_stage(tmp_path, "image_tokenizer", taken=1000, image_tokenizer__steps=2000).done
    assert history(tmp_path, "image_tokenizer")[0][0] == "extended"
    write_json(tmp_path / "data" / "started.json", {})
    with pytest.raises(StageMismatch, match=f"{tmp_path / 'data'} was made from this stage before"):
        open_stage(tmp_path, "image_tokenizer", taken=1500, image_tokenizer__steps=3000)


@pytest.mark.parametrize(
    "changes, whole", [({}, False), (dict(quantizer="lfq"), True), (dict(quantizer="lfq", entropy=0.0), False)]
)
def test_microbatches_decide_where_a_loss_looks_at_all_of_one(tmp_path: Path, changes: dict, whole: bool) -> None:
    made = config(**{f"image_tokenizer__{key}": value for key, value in changes.items()})
    experiment = Experiment(made, Workdir(tmp_path))
    assert settings.whole_batch(made) == whole
    may = changeable(whole_batch=whole)
    stage = experiment.stage("image_tokenizer", "image_tokenizer", may=may)
    write_text(stage.folder / "metrics.jsonl", "")
    made.image_tokenizer.accumulation = 2
    if not whole:
        experiment.stage("image_tokenizer", "image_tokenizer", may=may)
        return
    with pytest.raises(StageMismatch, match="accumulation"):
        experiment.stage("image_tokenizer", "image_tokenizer", may=may)


def test_an_adaptive_adversary_looks_at_all_of_a_microbatch(tmp_path: Path) -> None:
    made = config(image_tokenizer__adversary__kind="patch", image_tokenizer__adversary__adaptive=True)
    assert settings.whole_batch(made)


def test_what_is_made_of_a_model_follows_it_and_nothing_is_lost(tmp_path: Path) -> None:
    open_stage(tmp_path).finish({})

    def samples(**changes: Any):
        opened = Experiment(config(**changes), Workdir(tmp_path))
        return opened.stage("samples", "sampling", model=opened.trained(), may=changeable(anew=["model"]))

    stage = samples()
    write_json(stage.folder / "samples.jsonl", "of step 1000")
    stage.finish({})
    assert samples(sampling__batch_size=3).done
    may = "What may change here: sampling.batch_size, sampling.window at any time"
    with pytest.raises(StageMismatch, match=f"sampling.guidance.*{may}"):
        samples(sampling__guidance=3.0)
    open_stage(tmp_path, taken=1000, training__steps=1200).finish({})
    stage = samples()
    assert not stage.done and not (stage.folder / "samples.jsonl").exists()
    assert stage.aside == tmp_path / "samples.old-1" and read_json(stage.aside / "samples.jsonl") == "of step 1000"
    ((kind, step, changed),) = history(tmp_path, "samples")
    assert (kind, step) == ("anew", None) and changed["model.training.steps"] == [1000, 1200]
    write_json(stage.folder / "samples.jsonl", "of step 1200")
    assert not samples().aside  # after the interruption, it continues


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A workdir after 12 of 20 training steps: two checkpoints, and small stand-ins for the earlier stages."""
    folder = tmp_path / "origin"
    made = config(training__steps=20)
    for name in ("text_tokenizer", "data"):
        Workdir(folder).stage(name, {}).finish({})
        write_json(folder / name / "deep" / "file.json", name)
    open_stage(folder, made=made)
    open_stage(folder, taken=4, training__steps=20, training__log_every=5)
    open_stage(folder, taken=8, training__steps=24, training__log_every=5)
    checkpoints = Checkpoints(folder / "model" / "checkpoints")
    for step in (6, 12):
        checkpoints.save(step, params={"w": np.full(3, step)}, optimizer={"n": np.zeros(1)}, metadata={})
    checkpoints.close()
    write_text(folder / "model" / "metrics.jsonl", "".join(f'{{"step": {i}, "loss": 1.0}}\n' for i in range(1, 13)))
    write_json(folder / "config.json", configs.plain(made))
    return folder


def branched(origin: Path, folder: Path, step: int | None = None, **changes: Any) -> Experiment:
    experiment = Experiment(config(**dict(training__steps=16) | changes), Workdir(folder))
    branch(experiment, origin, step, lambda: experiment.fingerprint(*KEYS["model"], manifest={"size": 9}))
    return experiment


def test_a_branch_has_all_that_a_training_needs_and_leaves_its_origin_alone(origin: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in origin.rglob("*") if path.is_file()}
    folder = tmp_path / "new"
    (folder / ".data.branch~").mkdir(parents=True)  # a killed attempt
    for _ in range(2):  # the second time, the same command changes nothing
        branched(origin, folder, 6, training__schedule="wsd")
    assert {path: path.read_bytes() for path in origin.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in folder.glob("[!.]*")) == ["data", "model", "text_tokenizer"]
    # Changes before the branch come from the origin. Later changes there do not belong to this run.
    noted = {"training.steps": [20, 16], "training.schedule": ["cosine", "wsd"], "training.log_every": [5, 20]}
    assert history(folder) == [("cost", 4, {"training.log_every": [20, 5]}), ("branched", 6, noted)]
    assert read_json(folder / "model" / "history.json")[-1]["from"] == str(origin)
    shutil.rmtree(origin)
    assert read_json(folder / "data" / "deep" / "file.json") == "data" and (folder / "data" / "done.json").exists()
    assert steps_in(folder / "model" / "checkpoints") == [6]
    np.testing.assert_array_equal(restore_params(folder / "model" / "checkpoints")["w"], np.full(3, 6))
    stage = open_stage(folder, taken=6, training__steps=16, training__schedule="wsd")  # as if `train` continued it
    assert not stage.done and not stage.changed and len(read_metrics(folder / "model" / "metrics.jsonl")) == 12


@pytest.mark.parametrize("victim", ["write_bytes", "write_json", "adopt"])
def test_a_branch_that_was_killed_is_made_by_the_same_command(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    done = getattr(branches, victim)

    def die(*given: Any) -> None:
        done(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(branches, victim, die)
        with pytest.raises(KeyboardInterrupt):
            branched(origin, tmp_path / "new", 6)
    assert not (tmp_path / "new" / "model" / "started.json").exists()
    branched(origin, tmp_path / "new", 6)
    assert [kind for kind, *_ in history(tmp_path / "new")] == ["cost", "branched"]
    assert steps_in(tmp_path / "new" / "model" / "checkpoints") == [6]


@pytest.mark.parametrize(
    "step, changes, words",
    [
        (7, {}, r"a step with a checkpoint in .*origin/model/checkpoints, one of \[6, 12\]; found 7.*keep_every"),
        (None, dict(training__steps=12), "config.training.steps: expected more than the 12 .* found 12"),
        (6, dict(training__b2=0.5), "training had training.b2 = 0.95, this one has 0.5. What may change here: .*remat"),
        (6, dict(checkpoint_folder="origin/model/checkpoints"), "config.checkpoint_folder: expected another"),
    ],
)
def test_what_cannot_be_branched_is_said(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int | None, changes: dict, words: str
) -> None:
    if "checkpoint_folder" in changes:
        changes = {"checkpoint_folder": str(tmp_path / changes["checkpoint_folder"])}
    with pytest.raises(UserError, match=words):
        branched(origin, tmp_path / "new", step, **changes)
    assert not (tmp_path / "new" / "model" / "started.json").exists()
    assert branched(origin, tmp_path / "new", 6).workdir.model.exists()  # after the repair, it continues


def test_a_branch_never_grows_on_another_model(origin: Path, tmp_path: Path) -> None:
    open_stage(tmp_path / "new")
    for folder, words in ((tmp_path / "new", "has a model already"), (origin, "expected another workdir")):
        with pytest.raises(UserError, match=words):
            branched(origin, folder)
    with pytest.raises(UserError, match="expected a workdir whose training has begun"):
        branched(tmp_path / "nowhere", tmp_path / "third")


def test_another_process_waits_until_it_sees_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint = configs.plain(config().training)
    may = changeable()
    Workdir(tmp_path).stage("model", {"training": fingerprint}, may).finish({})
    longer = {"training": fingerprint | {"steps": 2000}}
    seen = []

    def reopen(seconds: float) -> None:
        seen.append(seconds)
        stage = Workdir(tmp_path).stage("model", longer, may)
        if stage.changed:
            stage.begin()

    monkeypatch.setattr("time.sleep", reopen)
    assert not Workdir(tmp_path, reader=True).stage("model", longer, may).done and seen
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("time.monotonic", iter(range(0, 10**6, 50)).__next__)
    with pytest.raises(NotShared, match="has other content"):
        Workdir(tmp_path, reader=True).stage("model", {"training": fingerprint}, may)


def test_what_is_to_be_repeated_is_a_flag_and_only_where_there_was_a_value(tmp_path):
    experiment = Experiment(configs.defaults(), Workdir(tmp_path))
    for old, words in [((32, 32), " To go on as before, repeat --config.data.size=(32,32)"), (ABSENT, "")]:
        error = advised(StageMismatch("data.size", "refused.", old), ("data",), experiment.workdir, STAGES)
        assert str(error) == f"refused.{words}"
    for field, flag in {
        "lora.rank": "lora.rank=2",  # a fact of some trainings, but a setting too
        "limit": "evaluation.limit=2",
        "probe_steps": "evaluation.tokenizer_probe_steps=2",
        "lora.init": "",  # the record has a hash
        "manifest.size": "",
    }.items():
        error = advised(StageMismatch(field, "refused.", 2), ("data",), experiment.workdir, STAGES)
        assert str(error) == "refused." + (flag and f" To go on as before, repeat --config.{flag}")
