"""The two tasks of the loop: the transformer on packed token rows, the image autoencoder on images.

A task (`step.TrainingTask`) is a model, its loss, its data and the metrics of a step.

Axes: B batch, T position, D model, N query heads, H head dim, L layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from ar_tokenizers.image.metrics import collapse, usage
from ar_tokenizers.image.objective import Objective
from ar_tokenizers.trees import Metrics, Totals

from ar_unified.data.batch import PackedBatch
from ar_unified.errors import nearest
from ar_unified.language.document import TASKS
from ar_unified.language.vocabulary import Role, Vocabulary
from ar_unified.metrics import LOG_Z_BY_ROLE, LOSS_BY_ROLE, LOSS_BY_TASK
from ar_unified.model import lora, transformer
from ar_unified.model.code_vectors import init_from_codebook
from ar_unified.model.config import TransformerConfig, matmul_parameters
from ar_unified.model.leaves import named
from ar_unified.model.lora import LoraConfig
from ar_unified.model.loss import token_losses, weighted_loss
from ar_unified.training.attention_share import attention_shares
from ar_unified.training.optimizer import is_decayed
from ar_unified.training.rates import Rates, make_rates, trained_in
from ar_unified.training.selection import EVERYTHING, Selection, beside_adapter, select
from ar_unified.training.step import STATISTICS, Batch, BatchOfStep, Drawing, Params, Stateless

Pixels = Mapping[str, jax.Array]  # {"pixels": uint8 [B, H, W, 3]}


def ratios(totals: Totals) -> dict[str, float]:
    """sum / count of every pair with a count above 0."""
    return {k: float(v[0] / v[1]) for k, v in totals.items() if isinstance(v, tuple) and v[1] > 0}


def _plain(totals: Totals, name: str) -> np.ndarray | float:
    """The value of a plain sum: one that has no count."""
    value = totals[name]
    assert not isinstance(value, tuple), name
    return value


def wrong_weights(roles: Mapping[str, float], tasks: Mapping[str, float]) -> list[str]:
    """One line per error in the weights of a `TransformerTask`. Each begins with the name of the field, such as
    "role_weights".
    """
    problems = []
    known_roles = [role.name.lower() for role in Role if role != Role.PAD]
    for what, given, known in (("role_weights", roles, known_roles), ("task_weights", tasks, TASKS)):
        if unknown := sorted(set(given) - set(known)):
            problems.append(f"{what}: unknown {unknown}; known: {', '.join(known)}{nearest(unknown[0], known)}")
        if negative := {name: weight for name, weight in given.items() if not weight >= 0}:
            problems.append(f"{what}: expected weights of 0 or more, found {negative}")
        elif not any({**dict.fromkeys(known, 1.0), **given}.values()):
            problems.append(f"{what}: all are 0, so there is nothing to learn")
    return problems


@dataclasses.dataclass(frozen=True, eq=False)
class TransformerTask(Stateless[Batch]):
    """Next-token prediction on packed rows that mix all tasks.

    The weight of a target is role_weights[its role] * task_weights[its document's task], times `prompt_weight` if the
    target belongs to the prompt. Missing names have weight 1, padding has weight 0.

    Args:
      config: the model.
      vocabulary: determines the role of each target, and how many rows of the head have a probability.
      batch: batch(step) returns a `data.batch.PackedBatch`.
      validation: held-out batches, always the same.
      text_bytes: i32 [text_size], the number of UTF-8 bytes of each text token; None: bits per byte are not reported.
      split: the first of the ids that have a separate softmax (`ImageLayout.split`); None: one softmax for all ids.
      mean_split: targets from this id on are one side, all others are the other side. The loss is half of one side's
          mean plus half of the other's, for any number of targets on each side (LargeWorldModel/LWM, train.py). None:
          one mean over all targets.
      z_loss: the weight of log(Z)^2, which prevents drifting logits (PaLM, arXiv:2204.02311, uses 1e-4).
      chunk: the number of positions for which logits exist at one time.
      attention_share: measures at each validation how much text and images attend to each other, by layer
          (training/attention_share.py). This takes about as long as two forward passes over one held-out batch.
      code_vectors: f32 [K, C] from the image tokenizer. Similar image codes then have similar initial rows. None: their
          rows are initialised at random, like rows of text.
      only: what is trained, as places for `selection.select`; (): everything.
      rates: factors on the learning rate, each PLACE=FACTOR (`rates.make_rates`).
      phases: (first step, places): from this step on, only these places are trained. The first phase starts at step 0.
          `only` is then ignored, and the places of all phases are trained. (): no phases.
      new: the ids that the place [new] means.
      lora: settings of an adapter that is trained instead of the model. Places of `only` and rows of `new` are trained,
          too. None or rank 0: no adapter.
    """

    config: TransformerConfig
    vocabulary: Vocabulary
    batch: BatchOfStep | Drawing
    validation: Sequence[object] = ()
    role_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    task_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    prompt_weight: float = 1.0
    split: int | None = None
    mean_split: int | None = None
    z_loss: float = 0.0
    text_bytes: np.ndarray | None = None
    chunk: int = 1024
    attention_share: bool = True
    code_vectors: np.ndarray | None = None
    only: Sequence[str] = ()
    rates: Sequence[str] = ()
    phases: Sequence[tuple[int, Sequence[str]]] = ()
    new: Collection[int] = ()
    lora: LoraConfig | None = None
    name: str = "transformer"
    unit: str = "tokens"
    side_factors: jax.Array | None = None  # facts of a global batch (`of_whole`)

    def __post_init__(self) -> None:
        if problems := wrong_weights(self.role_weights, self.task_weights):
            raise ValueError(problems[0])
        if self.code_vectors is not None and len(self.code_vectors) != self.vocabulary.codebook_size:
            raise ValueError(
                f"code_vectors: expected one for each of {self.vocabulary.codebook_size} image codes, "
                f"found {len(self.code_vectors)}"
            )
        if self.lora is not None and not self.lora.rank:
            object.__setattr__(self, "lora", None)
        if self.only or self.rates or self.phases:
            self.rates_of(self._shapes)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters. With `code_vectors`, similar codes have similar rows."""
        params = transformer.init(self.config, key)
        if self.code_vectors is not None:
            params = init_from_codebook(
                params, jnp.asarray(self.code_vectors), self.vocabulary.image_offset, jax.random.fold_in(key, 1)
            )
        if self.lora is None:
            return params
        params["lora"] = lora.init(self.config, self.lora, jax.random.fold_in(key, 2))
        return self.selection(params).fixed(params, self.lora.base_dtype)

    @property
    def products(self) -> str:
        """The dtype of the model's matrix products."""
        return self.config.dtype

    @functools.cached_property
    def _shapes(self) -> Params:
        """Shapes of the parameters. The key is made inside, as explained in `transformer.abstract_params`."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0)))

    def bind(self, params: Params) -> transformer.Transformer:
        """The model with these parameters, including its adapter."""
        return transformer.Transformer.bind(self.config, params, self.lora)

    def logical_axes(self, params: Params) -> Params:
        """The axis names of every parameter (parallel/rules.py)."""
        return transformer.logical_axes(params)

    def selection(self, params: Params) -> Selection:
        """The parameters that `only` or a phase names. If there is an adapter, its parameters and the rows of new ids
        are added. Without places and an adapter, all parameters are selected.
        """
        places = trained_in(self.only, self.phases)
        places = beside_adapter(places, params, self.new) if self.lora is not None else places
        return select(places, transformer.logical_axes(params), self.vocabulary, self.new)

    def rates_of(self, params: Params) -> Rates:
        """How fast each part of the parameters (given as values or shapes) is trained."""
        axes = transformer.logical_axes(params)
        return make_rates(self.rates, self.phases, axes, params, self.vocabulary, self.selection(params), self.new)

    def describe(self) -> dict[str, object]:
        """The config of the model and of the adapter."""
        adapter = {} if self.lora is None else {"lora": dataclasses.asdict(self.lora)}
        return {"kind": self.name, **dataclasses.asdict(self.config), **adapter}

    @property
    def of_role(self) -> jax.Array:
        """f32 [R], the weight of targets by role; 0 for padding."""
        return jnp.array([self.role_weights.get(role.name.lower(), 1.0) * (role != Role.PAD) for role in Role])

    @property
    def of_task(self) -> jax.Array:
        """f32, the weight of documents by task, in the order of TASKS."""
        return jnp.array([self.task_weights.get(task, 1.0) for task in TASKS])

    def rows(self, batch: Batch) -> PackedBatch[jax.Array]:
        """The packed rows of a batch, here the batch itself."""
        assert isinstance(batch, PackedBatch)
        return batch

    def weights(self, batch: PackedBatch[jax.Array]) -> jax.Array:
        """f32 [B, T], the weight of each target."""
        prompt = jnp.where(batch.prompt, self.prompt_weight, 1.0)
        return self.of_role[batch.roles] * self.of_task[batch.tasks] * prompt

    def of_targets(
        self, params: Params, batch: PackedBatch[jax.Array], keys: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """-log p of every target, and log Z of its softmax, f32 [B, T] each. keys: for dropout; None: no dropout."""
        return token_losses(*self._predictions(params, batch, keys), *self._softmax)

    def _predictions(
        self, params: Params, batch: PackedBatch[jax.Array], keys: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Hidden states, head and targets."""
        model = self.bind(params)
        drops = self.config.dropout or (self.lora is not None and self.lora.dropout)
        dropout_keys = keys if drops else None
        hidden = model(batch.tokens, batch.positions, batch.doc_start, dropout_keys=dropout_keys)
        return hidden, model.head(), batch.targets

    @property
    def _softmax(self) -> tuple[int, int, int | None]:
        """The arguments `chunk`, `used` and `split` of the loss functions."""
        return self.chunk, self.vocabulary.used, self.split

    def of_whole(self, batch: Batch) -> Self:
        """This task with the factors of text and images in a global batch, which `mean_split` needs."""
        if self.mean_split is None:
            return self
        return dataclasses.replace(self, side_factors=self._side_factors(self.rows(batch)))

    def _of_images(self, batch: PackedBatch[jax.Array]) -> jax.Array:
        assert self.mean_split is not None
        return batch.targets >= self.mean_split

    def _side_factors(self, batch: PackedBatch[jax.Array]) -> jax.Array:
        """The factors that multiply the weights of text and of images, f32 [2]. With them, each side has half of the
        total weight. If one side has no targets, it has no mean, and the other side still counts half, as in
        LargeWorldModel/LWM.
        """
        weight, image = self.weights(batch), self._of_images(batch)
        sides = jnp.stack([jnp.sum(jnp.where(side, weight, 0.0)) for side in (~image, image)])
        return jnp.where(sides > 0, 0.5 * jnp.sum(sides) / jnp.where(sides > 0, sides, 1.0), 0.0)

    def _shares(self, batch: PackedBatch[jax.Array], weight: jax.Array) -> jax.Array:
        """f32 [B, T], the weight of each target in the loss. The loss is divided by sum(weight)."""
        if self.mean_split is None:
            return weight
        factors = self._side_factors(batch) if self.side_factors is None else self.side_factors
        return weight * jnp.where(self._of_images(batch), factors[1], factors[0])

    def loss(
        self, params: Params, model_state: Params, batch: Batch, keys: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """Weighted cross-entropy and z-loss of the batch, with counts by role and task."""
        rows = self.rows(batch)
        weight = self.weights(rows)
        share = self._shares(rows, weight)
        loss, nll, lse = weighted_loss(*self._predictions(params, rows, keys), share, self.z_loss, *self._softmax)
        total = jnp.sum(weight)
        metrics = self.token_metrics(rows, weight, nll, lse)
        return loss, total, metrics | {"loss": (jnp.sum(share * nll), total)}

    def inspect(self, params: Params, model_state: Params, batch: Batch) -> Metrics:
        """The attention that text and images give to each other, if `attention_share` is on."""
        if not self.attention_share:
            return {}
        return attention_shares(self.bind(params), self.vocabulary, self.rows(batch))

    def token_metrics(
        self, batch: PackedBatch[jax.Array], weight: jax.Array, nll: jax.Array, lse: jax.Array
    ) -> Metrics:
        """Sums over a batch, from values that the loss has already computed.

        `loss/role/ROLE` and `log_z/role/ROLE` are means in nats over the trained positions with a target of this role.
        The first is the mean of -log p(target). The second is the mean of log Z = log sum_v exp(logit_v), the
        log-partition function of the target's softmax. If the logits of one modality drift, its log Z shows it first.
        `tokens/ROLE` counts the input tokens of each role; together they are `tokens`.
        """
        role = batch.roles
        trained = weight > 0
        present = batch.segment_ids > 0

        def pair(values: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jnp.sum(jnp.where(where, values, 0.0)), jnp.sum(where.astype(jnp.float32))

        metrics: Metrics = {
            "log_z": pair(lse, trained),  # log-sum-exp of a position's logits
            "fill": (jnp.sum(present, dtype=jnp.float32), jnp.float32(present.size)),
            "tokens": jnp.sum(present, dtype=jnp.float32),
            "attended": jnp.sum(jnp.where(present, batch.positions + 1, 0), dtype=jnp.float32),
        }
        read = self.vocabulary.role(batch.tokens)
        losses = {}
        for each in Role:
            if each != Role.PAD:
                name, of_role = each.name.lower(), trained & (role == each)
                metrics[f"tokens/{name}"] = jnp.sum(present & (read == each), dtype=jnp.float32)
                metrics[LOSS_BY_ROLE + name] = losses[each] = pair(nll, of_role)
                metrics[LOG_Z_BY_ROLE + name] = pair(lse, of_role)
        for index, task in enumerate(TASKS):
            metrics[LOSS_BY_TASK + task] = pair(nll, trained & (batch.tasks == index))
        image, count = losses[Role.IMAGE]
        metrics["bits_per_image_token"] = (image / math.log(2), count)
        if self.text_bytes is not None:
            text, _ = losses[Role.TEXT]
            sizes = jnp.asarray(self.text_bytes)[jnp.clip(batch.targets, 0, len(self.text_bytes) - 1)]
            counted = jnp.where(trained & (role == Role.TEXT), sizes, 0)
            metrics["bits_per_text_byte"] = (text / math.log(2), jnp.sum(counted, dtype=jnp.float32))
        return metrics

    def summary(self, totals: Totals) -> dict[str, float]:
        """The means of all sums that have a count."""
        return ratios(totals)

    @functools.cached_property
    def _trained(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the trained parameters, by path."""
        return named(jax.eval_shape(self.selection(self._shapes).take, self._shapes))

    @property
    def through_layers(self) -> bool:
        """Whether the backward pass goes through the layers. It does if anything in the layers or in the embedding is
        trained.
        """
        return self.trains("layers.", "lora.", "embedding")

    def trains(self, *beginnings: str) -> bool:
        """Whether the path of a trained parameter begins with one of `beginnings`."""
        return any(path.startswith(beginnings) for path in self._trained)

    def flops(self, totals: Totals) -> float:
        """6 * N_matmul * tokens + 12 * L * N * H * attended keys (forward 1 part, backward 2; remat not counted).

        N_matmul: `model.config.matmul_parameters`. A token attends to position + 1 keys, so a document of T tokens
        counts 12 * L * N * H * T / 2 per token: the usual attention term, halved for causality. Padding is not counted.
        If only a part is trained, the result includes only what the backward pass computes. Per token, these are 2
        FLOPs for each trained weight of a matmul (the gradients of weights), and 2 FLOPs for each weight that the
        backward pass goes through (the gradients of inputs). The matrices of an adapter count as matmuls, too.
        """
        c, (layers, head) = self.config, matmul_parameters(self.config)
        looked_up, below_head = not c.tie_embeddings, self._trained.keys() - {"head"}
        trained = sum(
            math.prod(x.shape)
            for path, x in self._trained.items()
            if is_decayed(path.split("."), x) and not (looked_up and path == "embedding")
        )
        deep = self.through_layers
        beside = sum(math.prod(x.shape) for path, x in self._trained.items() if path.startswith("lora."))
        passes = layers + head + trained + layers * deep + head * bool(below_head) + 2 * beside
        attention = (12.0 if deep else 4.0) * c.n_layers * c.n_heads * c.head_dim
        return float(2.0 * passes * _plain(totals, "tokens") + attention * _plain(totals, "attended"))


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizerTask:
    """The image autoencoder, and its adversary if it has one, on batches {"pixels": uint8 [B, H, W, 3]}.

    Parameters and losses have the keys "autoencoder" and "discriminator" (ar_tokenizers.image.objective). rates:
    factors on the learning rate, each PLACE=FACTOR (`rates.make_rates`).
    """

    objective: Objective
    batch: BatchOfStep[Mapping[str, np.ndarray]]
    validation: Sequence[Mapping[str, np.ndarray]] = ()
    rates: Sequence[str] = ()
    name: str = "image_tokenizer"
    unit: str = "images"
    products: None = None  # convolutions

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters of the autoencoder and of its discriminator."""
        return self.objective.init(key)

    def of_whole(self, batch: Pixels) -> TokenizerTask:
        """Returns the task itself, because the loss of a part of a batch does not depend on the whole batch."""
        return self

    def selection(self, params: Params) -> Selection:
        """Everything is trained."""
        return EVERYTHING

    def rates_of(self, params: Params) -> Rates:
        """The rates of the parameters, by `rates`."""
        return make_rates(self.rates, (), self.logical_axes(params), params, Vocabulary(1, 0), EVERYTHING)

    def init_state(self, params: Params) -> Params:
        """The averaged weights and the statistics of the codebook before the first step."""
        return self.objective.init_state(params)

    def state_axes(self, params: Params, model_state: Params) -> Params:
        """The same axes as for the parameters, because most of the state is their averages."""
        return self.logical_axes(model_state)

    def inference_params(self, params: Params, model_state: Params) -> Params:
        """The autoencoder's averaged weights if there are any, else its parameters."""
        return self.objective.inference_params(params, model_state)

    def logical_axes(self, params: Params) -> Params:
        """Names the output channels of every kernel. Vectors and scalars have no named axis."""
        return jax.tree.map(
            lambda x: (None,) * (x.ndim - 1) + ("channels",) if x.ndim > 1 else (None,) * x.ndim, params
        )

    def describe(self) -> dict[str, object]:
        """The autoencoder's config, its losses, and the hash of the perceptual network."""
        objective = self.objective
        return {
            "kind": self.name,
            **dataclasses.asdict(objective.autoencoder),
            "objective": dataclasses.asdict(objective.config),
            "perceptual_sha256": objective.perceptual.hash,
        }

    def loss(
        self, params: Params, model_state: Params, batch: Pixels, keys: jax.Array | None
    ) -> tuple[dict[str, jax.Array], jax.Array, Metrics]:
        """The losses of the autoencoder and the discriminator, each for its own parameters, from one forward pass."""
        images = jnp.float32(batch["pixels"].shape[0])
        losses, metrics, sums = self.objective.losses(params, model_state, batch["pixels"], keys)
        return losses, images, {"images": images, STATISTICS: sums, **metrics}

    def inspect(self, params: Params, model_state: Params, batch: Pixels) -> Metrics:
        """No further metrics: {}."""
        return {}

    def update_state(self, params: Params, model_state: Params, sums: Params) -> tuple[Params, Params]:
        """Updates the averages and the codebook with the statistics of the batch."""
        return self.objective.update_state(params, model_state, sums)

    def summary(self, totals: Totals) -> dict[str, float]:
        """The means of all sums with a count, and the usage of the codebook."""
        codes = usage(np.asarray(_plain(totals, "code_counts"))) if "code_counts" in totals else {}
        return ratios(totals) | {f"codes/{k}": float(v) for k, v in codes.items()}

    def warning(self, line: Mapping[str, float]) -> str:
        """A warning if the codebook has collapsed."""
        autoencoder = self.objective.autoencoder
        found = {k.removeprefix("codes/"): v for k, v in line.items() if k.startswith("codes/")}
        return collapse(found, autoencoder.codebook_size, autoencoder.quantizer)

    def flops(self, totals: Totals) -> None:
        """None, because they are not known."""
        return None
