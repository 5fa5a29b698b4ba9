"""Training by rewards: the engine draws groups of answers inside the training job, and a reward scores each answer.

The weights go from the training to the sampler without leaving the devices. Every process draws the groups of its own
rows of the batch on its own devices. A prompt and its samples depend only on their numbers, so the batch of a step is
the same for any number of processes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ar_unified.data.images import ImageCodec, by_size
from ar_unified.experiment.policy_rows import room, rows
from ar_unified.experiment.prompts import Asked
from ar_unified.language.document import CodesPart, Document, ImagePart, Part
from ar_unified.model.lora import LoraConfig, merged
from ar_unified.model.transformer import logical_axes
from ar_unified.parallel.handover import hand_over
from ar_unified.parallel.mesh import make_mesh
from ar_unified.parallel.rules import batch_part, place_batch
from ar_unified.rewards.reward import Failure, Reward, RewardConfig, RewardFailed, Verdict, words
from ar_unified.sampling.engine import Engine
from ar_unified.sampling.plan import Plan
from ar_unified.sampling.request import Request, Sample, TooLong
from ar_unified.training.policy import PolicyBatch, PolicyConfig, group_advantages, log_probabilities
from ar_unified.training.step import Drawing, Params

_PATIENCE = 3  # maximum number of consecutive rounds of sampling without any rewards
_OTHERS = 1 << 40  # prompts with this number or higher are substitutes for others


@dataclasses.dataclass(frozen=True)
class DrawingConfig:
    """How answers are drawn for training. top_k, top_p and the repetition penalty are off. They would set probabilities
    to 0, and a policy ratio cannot raise a probability from 0.

    Attributes:
        mode: one of `sampling.request.MODES`. "free" means the mode of the prompt's own answer: an image, a text or
            both.
        temperature: the temperature for texts and images; the policy is the distribution at this temperature.
        guidance: the scale for images; the policy is the guided distribution. The context without the prompt needs one
            more row.
        max_tokens: the largest number of tokens in an answer; 0 means as many as its images need in mode "image", else
            as many as there is room for.

    Raises ValueError, which names the field.
    """

    mode: str = "free"
    temperature: float = 1.0
    guidance: float = 1.0
    max_tokens: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature: expected more than 0, because greedy answers of a group are all the same; found "
                f"{self.temperature}"
            )
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens: expected 0 (as many as fit) or more, found {self.max_tokens}")
        self.request("-").check()
        if self.guidance != 1 and self.mode not in ("image", "free"):
            raise ValueError(
                f"guidance: expected 1 with mode {self.mode!r}, found {self.guidance}: only answers of one "
                'image (mode "image") can be learned with guidance'
            )

    def request(self, name: str, **more: Any) -> Request:
        """The request with which every answer is drawn."""
        return dataclasses.replace(
            Request(id=name, parts=()),
            mode=self.mode,  # type: ignore[arg-type]  # `Request.check` checks it
            guidance=self.guidance,
            max_tokens=self.max_tokens or None,
            text=dataclasses.replace(Request.text, temperature=self.temperature),
            image=dataclasses.replace(Request.image, temperature=self.temperature),
            **more,
        )


class Rollouts(Drawing[PolicyBatch[jax.Array]]):
    """Groups of answers with their advantages.

    Args:
        prompts: returns the prompt with a given number.
        engine: an engine made with `logprobs` on the devices of this process; its parameters are replaced.
        tokenizer: the image tokenizer.
        reward: scores an answer.
        rewarding: what happens when the reward fails.
        policy: the settings of groups and minibatches.
        batch_size: B, the samples of a step on `mesh`.
        length: T, the positions of a row.
        contexts: C, the rows of each sample in the batch.
        chunk, lora: as in `log_probabilities`.
        failed: a file to which every answer without a reward is written, or None.
        say: prints a line for the user.

    Raises ValueError, which names the field, for sizes that do not fit together.
    """

    def __init__(
        self,
        prompts: Callable[[int], Asked],
        engine: Engine,
        tokenizer: ImageCodec,
        reward: Reward,
        rewarding: RewardConfig,
        policy: PolicyConfig,
        *,
        mesh: Mesh,
        batch_size: int,
        length: int,
        contexts: int = 1,
        chunk: int = 1024,
        lora: LoraConfig | None = None,
        failed: Path | None = None,
        say: Callable[[str], object] = print,
    ):
        self.every = policy.steps
        self._index, self._count = batch_part(mesh, batch_size)
        require_groups(policy, batch_size, self._count)
        self._prompts, self._engine, self._tokenizer, self._reward = prompts, engine, tokenizer, reward
        self._rewarding, self._policy, self._mesh, self._say = rewarding, policy, mesh, say
        self._groups, self._length, self._contexts = batch_size // policy.group_size, length, contexts
        self._failed, self._without = failed, 0
        self._held: tuple[int, list[PolicyBatch[jax.Array]]] = (-1, [])
        self._old = jax.jit(lambda params, batch: log_probabilities(engine.config, chunk, params, batch, lora))
        self._whole = (
            jax.jit(partial(merged, lora, dtype=engine.config.dtype)) if lora is not None else lambda params: params
        )

    def __call__(self, step: int, params: Params) -> PolicyBatch[jax.Array]:
        """Returns the batch of a step. Raises RewardFailed if a reward fails and `rewarding` says "stop", or if
        several consecutive rounds of sampling have no group with all its rewards."""
        drawing, at = divmod(step, self.every)
        if self._held[0] != drawing:
            self._held = drawing, self._drawn(drawing, params)
        return self._held[1][at % self._policy.minibatches]

    def _drawn(self, drawing: int, params: Params) -> list[PolicyBatch[jax.Array]]:
        """The minibatches of one round of sampling, on the mesh."""
        here = self._engine.mesh or make_mesh({}, jax.local_devices()[:1])
        whole = self._whole(params)
        self._engine.params = hand_over(whole, logical_axes(whole), here)
        part = self._index, self._count
        parts = self._policy.minibatches
        each = self._groups // self._count
        first = [drawing * parts * self._groups + j * self._groups + self._index * each for j in range(parts)]
        slots = [begin + i for begin in first for i in range(each)]
        groups = self._with_signal(drawing, slots)
        self._tell(drawing, groups)
        batches = [place_batch(self._mesh, self._rows(groups[j * each : (j + 1) * each]), part) for j in range(parts)]
        if self.every == 1:
            return batches
        with jax.set_mesh(self._mesh):
            return [dataclasses.replace(batch, old=self._old(params, batch)) for batch in batches]

    def _with_signal(self, drawing: int, slots: Sequence[int]) -> list[_Group]:
        """A group for each prompt number in `slots`. A group without a signal is replaced by the group of another
        prompt, up to `redraws` times.
        """
        groups = dict(zip(slots, self._ask(slots), strict=True))
        for attempt in range(self._policy.redraws):
            poor = [slot for slot in slots if not groups[slot].has_signal]
            numbers = [_OTHERS + slot * self._policy.redraws + attempt for slot in poor]
            groups |= zip(poor, self._ask(numbers), strict=True)
        return [groups[slot] for slot in slots]

    def _ask(self, numbers: Sequence[int]) -> list[_Group]:
        """Draws and scores the groups of the prompts with these numbers."""
        if not numbers:
            return []
        asked = [self._prompts(number) for number in numbers]
        G = self._policy.group_size
        plans = {one.plan.request.id: one.plan for one in asked}
        found: dict[tuple[str, int], Sample] = {}
        for sample in self._engine.draw((plan, i) for plan in plans.values() for i in range(G)):
            found[sample.request.id, sample.index] = sample
        samples = [found[one.plan.request.id, i] for one in asked for i in range(G)]
        prompts = [one.document for one in asked for _ in range(G)]
        verdicts = self._judged(prompts, samples)
        return [_Group(one, samples[i * G : (i + 1) * G], verdicts[i * G : (i + 1) * G]) for i, one in enumerate(asked)]

    def _judged(self, prompts: Sequence[Document], samples: Sequence[Sample]) -> list[Verdict]:
        """For each sample, its reward, or a Failure that says why it has none."""
        codes = [part.codes for sample in samples for part in _parts(sample) if isinstance(part, CodesPart)]
        pixels = iter(by_size(self._tokenizer.decode, codes) if codes else ())
        answers = {}
        for i, sample in enumerate(samples):
            if sample.document is not None:
                parts = [ImagePart(next(pixels)) if isinstance(part, CodesPart) else part for part in _parts(sample)]
                answers[i] = Document.of(parts, id=sample.request.id, meta={"sample": sample.index})
        said = dict(zip(answers, self._reward([prompts[i] for i in answers], [*answers.values()]), strict=True))
        return [said.get(i, Failure(samples[i].error)) for i in range(len(samples))]

    def _rows(self, groups: Sequence[_Group]) -> PolicyBatch[np.ndarray]:
        G = self._policy.group_size
        reward = np.array([group.rewards for group in groups])
        scored = np.repeat([group.scored for group in groups], G)
        advantage, deviation, flat = group_advantages(reward, self._policy.scale_rewards)
        served = [(group.asked.plan, sample) for group in groups for sample in group.samples]
        return rows(
            self._engine.grammar,
            served,
            self._length,
            self._contexts,
            reward=np.where(scored, reward.reshape(-1), 0.0).astype(np.float32),
            advantage=np.where(scored, advantage.reshape(-1), 0.0).astype(np.float32),
            deviation=deviation.reshape(-1).astype(np.float32),
            scored=scored,
            flat=flat.reshape(-1).copy(),
            cut=np.array([sample.finish_reason == "length" for _, sample in served]),
        )

    def _tell(self, drawing: int, groups: Sequence[_Group]) -> None:
        """Reports every answer without a reward. Raises RewardFailed like `__call__`."""
        failures = [
            (group.asked.document, sample, verdict.reason)
            for group in groups
            for sample, verdict in zip(group.samples, group.verdicts, strict=True)
            if isinstance(verdict, Failure)
        ]
        self._without = 0 if any(group.scored for group in groups) else self._without + 1
        if not failures:
            return
        step, (prompt, sample, reason) = drawing * self.every, failures[0]
        many = f"step {step}: {len(failures)} of {len(groups) * self._policy.group_size} answers have no reward"
        message = f"{many}; the first, sample {sample.index} of {words(prompt)}: {reason}"
        if self._failed is not None:
            with open(self._failed, "a", encoding="utf-8") as file:
                for prompt, sample, reason in failures:
                    row = {"step": step, "prompt": words(prompt), "id": sample.request.id, "sample": sample.index}
                    file.write(json.dumps(row | {"reason": reason}, ensure_ascii=False) + "\n")
        if self._rewarding.on_error == "stop":
            raise RewardFailed(f"{message}. config.reward.on_error is 'stop': correct the reward and start again")
        if self._without >= _PATIENCE:
            raise RewardFailed(
                f"{message}. In {_PATIENCE} rounds of sampling in a row, no group had all its rewards, "
                "so there is nothing to learn from: correct the reward and start again"
            )
        self._say(f"{message}. Their groups are left out")


@dataclasses.dataclass(frozen=True)
class _Group:
    """The answers to one prompt."""

    asked: Asked
    samples: Sequence[Sample]
    verdicts: Sequence[Verdict]

    @property
    def scored(self) -> bool:
        """Whether every answer has a reward. If one reward is missing, the group's mean reward is not known."""
        return not any(isinstance(verdict, Failure) for verdict in self.verdicts)

    @property
    def rewards(self) -> list[float]:
        return [0.0 if isinstance(verdict, Failure) or not self.scored else verdict for verdict in self.verdicts]

    @property
    def has_signal(self) -> bool:
        return self.scored and len(set(self.rewards)) > 1


def _parts(sample: Sample) -> tuple[Part, ...]:
    return sample.document.parts if sample.document is not None else ()


def require_groups(policy: PolicyConfig, batch_size: int, parts: int = 1) -> None:
    """Raises ValueError unless a batch, and each of its `parts` equal parts, consists of whole groups."""
    if batch_size % (policy.group_size * parts):
        of = f" for each of {parts} processes" if parts > 1 else ""
        raise ValueError(
            f"batch_size: expected a multiple of {policy.group_size} (config.reward.group_size){of}, found {batch_size}"
        )


def fitting(engine: Engine, length: int) -> Callable[[Request], Plan]:
    """`Engine.plan` for rows of `length` positions. Raises RequestError if a sample might not fit into a row."""

    def plan(request: Request) -> Plan:
        found = engine.plan(request)
        if (needed := room(found)) > length:
            raise TooLong(
                f"the prompt, answer and contexts for guidance need {needed} positions, and a row has {length}: "
                "raise config.training.sequence_length or lower config.reward.max_tokens"
            )
        return found

    return plan
