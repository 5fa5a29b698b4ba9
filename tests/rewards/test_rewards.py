"""Rewards: their values for good answers, and rewards that raise, hang or return nonsense."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from ar_unified.data import scenes
from ar_unified.errors import UserError
from ar_unified.language.document import Document, ImagePart, TextPart
from ar_unified.rewards.functions import guarded
from ar_unified.rewards.opening import open_reward
from ar_unified.rewards.reward import Failure, RewardConfig, words


def asking(text="What is it?", right="A cat.", **meta):
    return Document.of((TextPart(text), TextPart(right)), prompt=1, id="q", meta=meta)


def saying(text, sample=0):
    return Document.of((TextPart(text),), id="q", meta={"sample": sample})


def of(function, timeout=5.0):
    return open_reward(RewardConfig(function=function, timeout=timeout))


def test_shipped_rewards():
    prompts, answers = [asking()] * 3, [saying("A cat. "), saying("A dog."), saying("")]
    assert of("exact_answer")(prompts, answers) == [1.0, 0.0, 0.0]
    assert of("length")(prompts, answers) == [7.0, 6.0, 0.0]
    assert of("brevity")(prompts, answers) == [-7.0, -6.0, 0.0]
    (nothing,) = of("exact_answer")([Document.of((TextPart("Go on"),))], [saying("")])
    assert isinstance(nothing, Failure) and "no right answer" in nothing.reason


def test_the_checkers_of_pixels_read_the_image():
    rng = np.random.default_rng(0)
    scene, other = (scenes.sample_scene(rng, "train") for _ in range(2))
    prompt = asking(scenes.caption(rng, scene), scene=scenes.scene_to_json(scene))
    shown = [Document.of((ImagePart(scenes.render(each, 64)),)) for each in (scene, other)]
    twice = Document.of((shown[0].parts[0], shown[0].parts[0]))
    assert of("shapes")([prompt] * 4, [*shown, twice, saying("no image")]) == [1.0, 0.0, 0.0, 0.0]
    (lost,) = of("shapes")([asking()], shown[:1])
    assert isinstance(lost, Failure) and lost.reason == "KeyError: 'scene'"


def test_graded_shapes_count_objects_and_what_is_near():
    circle, square = (
        scenes.Object("circle", "purple", "large", "top left"),
        scenes.Object("square", "red", "small", "top right"),
    )
    near = replace(circle, shape="square")
    prompt = asking("", scene=scenes.scene_to_json((circle, square)))
    answers = [Document.of((ImagePart(scenes.render(s, 64)),)) for s in [
        (circle, square), (replace(circle, size="small"), square), (near, square), (circle,),
        (replace(near, place="bottom left"), square), (circle, square, replace(near, place="bottom left")),
    ]]  # fmt: skip
    answers += [Document.of((answers[0].parts[0],) * 2), saying("no image")]
    found = of("shapes_closeness")([prompt] * 8, answers)
    assert found[0] == pytest.approx(1) and found[6:] == [0, 0]
    assert found[3] == pytest.approx(1 / 2) and found[5] == pytest.approx(
        2 / 3
    )  # one object is missing, one is too many
    assert found[0] > found[1] > found[2] > found[3] > found[4] == pytest.approx(1 / 3)
    assert 0.1 < found[2] - 1 / 2 < 0.2  # a square, not a circle, in the same colour
    assert of("shapes_objects")([prompt] * 8, answers) == pytest.approx([1, 1, 1 / 3, 1 / 2, 1 / 3, 2 / 3, 0, 0])


def test_one_answer_that_fails_costs_no_other():
    def reward(prompt, answer):
        text = answer.parts[0].text
        if text == "raise":
            raise ValueError("not like this")
        if text == "hang":
            time.sleep(60)
        return {"nan": float("nan"), "none": None, "words": "many"}.get(text, len(text))

    texts = ["ab", "raise", "abc", "hang", "abcd", "nan", "none", "words", "hang", "abcde"]
    began = time.monotonic()
    found = guarded(reward, 0.3)([asking()] * len(texts), [saying(text) for text in texts])
    assert time.monotonic() - began < 20
    assert [value for value in found if not isinstance(value, Failure)] == [2, 3, 4, 5]
    reasons = [value.reason for value in found if isinstance(value, Failure)]
    late = "the function returned nothing within 0.3 s"
    assert reasons == [
        "ValueError: not like this", late, "expected a finite number, found nan",
        "expected a number, found None", "expected a number, found 'many'", late,
    ]  # fmt: skip


def test_a_function_is_named_by_module_and_name(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_of_a_test.py").write_text("def vowels(prompt, answer):\n    return 3\n\nnumber = 1\n")
    (tmp_path / "my_broken_rewards.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert of("my_rewards_of_a_test:vowels")([asking()], [saying("x")]) == [3.0]
    for name, message in {
        "my_rewards_of_a_test:vowel": "no function of that name; did you mean 'vowels'",
        "my_rewards_of_a_test:number": "no function of that name",
        "no_such_module:f": "No module named 'no_such_module'; Python searches for modules in its path",
        "my_broken_rewards:f": "cannot be imported: ZeroDivisionError",
        "shape": "did you mean 'shapes'",
        "shapes:": "module:function",
        "": "found none",
    }.items():
        with pytest.raises(UserError, match=message):
            of(name)
    with pytest.raises(ValueError, match="on_error: expected one of skip, stop; found 'skipp'; did you mean 'skip'"):
        RewardConfig(on_error="skipp")
    with pytest.raises(ValueError, match="timeout: expected more than 0"):
        RewardConfig(timeout=0)


COMMAND = """
import json, sys
for line in sys.stdin:
    row = json.loads(line)
    with open(row["answer"][1]["image"], "rb") as file:
        assert file.read(4) == b"\\x89PNG"
    print(len(row["answer"][0]["text"]) + row["meta"]["plus"] + row["sample"] * 10)
"""


def test_a_command_reads_json_and_prints_numbers(tmp_path):
    (tmp_path / "reward.py").write_text(COMMAND)
    image = ImagePart(np.zeros((4, 4, 3), np.uint8))
    answers = [Document.of((TextPart("ab" * i), image), id="q", meta={"sample": i}) for i in (1, 2)]
    reward = of(f"command:{sys.executable} {tmp_path / 'reward.py'}")
    assert reward([asking(plus=0.5), asking(plus=1)], answers) == [12.5, 25.0]


@pytest.mark.parametrize(
    "program, message",
    [
        ("import sys; print(1); sys.exit('it is broken')", "ended with status 1 and said 'it is broken'"),
        ("print(1)", "expected 2 lines with one number each, found 1"),
        ("import time; time.sleep(60)", "did not end within 1 s"),
        ("print('nan'); print('?')", "expected a finite number, found nan"),
    ],
)
def test_a_command_that_fails_says_so(program, message):
    began = time.monotonic()
    found = of(f'command:{sys.executable} -c "{program}"', timeout=0.5)([asking()] * 2, [saying("a"), saying("b")])
    assert all(isinstance(value, Failure) for value in found) and message in found[0].reason
    assert time.monotonic() - began < 20


def test_a_command_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="program 'no-such-program' does not exist or cannot be run"):
        of("command:no-such-program --fast")


def test_a_file_of_scores(tmp_path):
    file = tmp_path / "scores.jsonl"
    rows = [{"id": "q", "sample": 0, "score": 0.5}, {"id": "q", "sample": 2, "score": "nan"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = of(f"scores:{file}")([asking()] * 3, [saying("a", sample) for sample in (0, 1, 2)])
    assert found[0] == 0.5
    assert [value.reason for value in found[1:]] == [
        f"{file} has no score for sample 1 of 'q'", "expected a finite number, found nan",
    ]  # fmt: skip
    file.write_text('{"id": "q"}\n')
    with pytest.raises(UserError, match='scores.jsonl:1: expected {"id", "sample", "score"}'):
        of(f"scores:{file}")
    with pytest.raises(UserError, match="No such file"):
        of(f"scores:{tmp_path / 'none.jsonl'}")


def test_a_prompt_is_named():
    assert words(asking("A red circle")) == "prompt 'q' ('A red circle')"
