"""An experiment that evaluates the model of a bundle. Nothing is trained, and there is no workdir of a run.

Its config (`config.of_bundle`) says on which documents it is evaluated, and how. Everything else comes from the bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from ar_tokenizers.codec import Codec
from ar_tokenizers.image.tokenizer import ImageTokenizer
from ml_collections import ConfigDict

from ar_unified.bundle import Bundle
from ar_unified.data import prepare as preparing
from ar_unified.data.images import CodesAlone, NoImages
from ar_unified.data.sources import Source
from ar_unified.errors import UserError, about
from ar_unified.experiment import facts, likelihood, objective, settings
from ar_unified.experiment.experiment import Experiment
from ar_unified.language.grammar import Grammar
from ar_unified.model.dtypes import is_vector
from ar_unified.model.transformer import Params, abstract_params
from ar_unified.parallel import rules, zigzag
from ar_unified.sampling import weights
from ar_unified.training.loop import held_out_scores
from ar_unified.training.tasks import TransformerTask
from ar_unified.workdir import Workdir


class OfBundle(Experiment):
    """Opens what an evaluation needs.

    Args:
        folder: the folder for the results.
        sources: documents to evaluate on; () means those that the config holds out.

    Attributes:
        own: the bundle.
        warning: what a person should know before generating images with it; "" if there is nothing.
    """

    def __init__(self, config: ConfigDict, folder: Path, sources: Sequence[Source] = ()):
        super().__init__(config, Workdir(folder))
        self.own, self._sources = Bundle(config.init), list(sources)
        self.warning = str((self.own.published or {}).get("untrained", ""))

    @cached_property
    def held_out(self) -> dict[str, list[Source]]:
        """Held-out sets by name, as in an experiment."""
        return {"validation": self._sources} if self._sources else super().held_out

    @cached_property
    def text_tokenizer(self) -> Codec:
        """The bundle's text tokenizer."""
        return self.own.text_tokenizer

    @cached_property
    def text_only(self) -> bool:
        """True if there is no image tokenizer: the model has no images, or has them only as codes."""
        return not self.own.has_images

    @cached_property
    def image_tokenizer(self) -> ImageTokenizer | NoImages:
        """The bundle's image tokenizer, or a stand-in if it has none."""
        codes = self.grammar.vocabulary.codebook_size
        return self.own.image_tokenizer(settings.images_at_once(self.config)) or (
            CodesAlone(codes) if codes else NoImages()
        )

    @cached_property
    def grammar(self) -> Grammar:
        """The bundle's grammar."""
        return self.own.grammar

    def _restored(self, target: Any) -> Params:
        return weights.read(self.own, target)

    @property
    def facts(self) -> dict[str, str]:
        """Short facts for the top of a report."""
        bundle = {"bundle": f"{self.own.folder.resolve().name}, sha256 {self.own.hash[:12]}"}
        return bundle | facts.of_model(self) | ({"warning": self.warning} if self.warning else {})

    def losses(self) -> dict[str, float]:
        """The validation losses that a training with this config would measure for these weights, by modality, role and
        task.

        The held-out documents become tokens in the workdir's data/validation. Raises UserError if nothing can be read,
        the documents are preference pairs, or the mesh cannot split the rows.
        """
        sources, training = self.held_out["validation"], self.config.training
        if not sources:
            return {}
        with about("config.training.batch_size"):
            rules.batch_spec(self.mesh, (training.batch_size // training.accumulation, 1, 1), "a microbatch")
        with about("config.training.sequence_length"):
            zigzag.require_pieces(training.sequence_length, self.mesh.shape["context"])
        self._prepare(sources)
        batches = likelihood.held_out_batches(self, settings.phases(training, {}))
        if batches is None:
            return {}
        read = objective.VALIDATION_BATCHES * training.batch_size
        rows = sum(batches.rows_per_epoch.values())
        self.say(f"losses: measured on {min(read, rows)} of {rows} rows of {training.sequence_length} tokens")
        task: TransformerTask = TransformerTask(
            batch=batches.batch,
            validation=objective.validation(batches),
            prompt_weight=self.config.loss.prompt,
            **objective.loss_settings(self),
        )
        return held_out_scores(task, self._as_trained(), self.mesh, training.accumulation)

    def _as_trained(self) -> Params:
        """The parameters, sharded as in a training. Matrices keep their dtype. A training has them in float32 but
        multiplies in the model's dtype, so the losses are the same."""
        shapes = abstract_params(self.model, self.mesh)
        vectors = jax.tree_util.tree_map_with_path(lambda path, x: x.dtype if is_vector(path) else None, shapes)
        return self.own.params(jax.tree.map(lambda x: x.sharding, shapes), vectors)

    def _prepare(self, sources: Sequence[Source]) -> None:
        with about(f"bundle {self.own.folder}"):  # documents may not fit, e.g. images for a model of text
            report = preparing.prepare(
                sources,
                self.grammar,
                self.image_tokenizer,
                self.workdir.data / "validation",
                max_tokens=self.config.data.max_tokens,
                resize=self.resize,
            )
        self.say(f"validation:\n{report}")
        if pairs := [name for name, source in report.sources.items() if source.preferences]:
            raise UserError(
                f"source {pairs[0]!r}: expected documents, found preference pairs: `ar-unified score --from "
                f"{self.own.folder}` compares their answers"
            )
