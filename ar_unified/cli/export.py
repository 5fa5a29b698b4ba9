"""Write the trained model as a bundle: one folder with the complete model.

Reads what the stages have written into the workdir, but no sources. Without --config, it uses the config with which the
workdir was last started. config.sampling.checkpoint chooses the checkpoint: last or best. Writes into FOLDER, whole or
not at all:
  model-*.safetensors and their index   the transformer's weights, with their dtypes
  text_tokenizer/  image_tokenizer/     both tokenizers (for text alone: only the first)
  config.json                           the model's shape, how its data were made, and the defaults of requests
  language.json                         the grammar
  README.md                             the model card, with the numbers of evaluation.json if they belong to these
                                        weights
  bundle.json                           the sha256 and the size of each file except the card
`ar_unified.load("FOLDER")` opens it without an experiment or workdir; --config.init=FOLDER begins a training with it.

After training with LoRA (config.lora), the bundle's weights include the adapter. --to peft writes only the adapter, in
PEFT's form, and any rows of ids that were trained with it. If the training has extended a language model by images,
--to base writes the extended model without the adapter, as a bundle. This bundle is the base model of the adapter.

With --from and --to, it writes a bundle in a form that other programs read. From an image tokenizer (an imported one,
or image_tokenizer/ of a workdir or a bundle) it writes a file with the names of weights that its publishers use:
  ar-unified export --from BUNDLE --to hf --output FOLDER
  ar-unified export --from workdirs/photos/image_tokenizer --to taming --output FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from ar_unified import bundle
from ar_unified.bundle import Bundle
from ar_unified.checkpoint import Checkpoints
from ar_unified.cli.arguments import PROCESSES, refuse_unread
from ar_unified.data.images import NoImages, draws_none
from ar_unified.errors import UserError
from ar_unified.evaluation.card import card
from ar_unified.experiment import config as configs
from ar_unified.experiment import settings
from ar_unified.experiment.check_trained import DATA, LOSS, recorded
from ar_unified.experiment.experiment import Experiment
from ar_unified.experiment.facts import trained_adapter
from ar_unified.experiment.start import by_first_process, open_experiment
from ar_unified.interop import ADAPTER, BESIDE, FORMS, image_tokenizer, peft
from ar_unified.interop.exporting import export_published
from ar_unified.interop.extended import KEY as EXTENDED
from ar_unified.interop.token_rows import TokenRows
from ar_unified.manifests import Json, manifest_hash
from ar_unified.model.config import parameter_count
from ar_unified.model.own_rows import TABLES
from ar_unified.sampling.request import DEFAULTS
from ar_unified.tensors import read_tensors
from ar_unified.workdir import read_json

_SAMPLING = ("max_length", "kv_dtype", *DEFAULTS)


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Writes what the arguments name; returns the exit status. Raises UserError."""
    if arguments.shard_mib is not None and arguments.shard_mib < 1:
        raise UserError(f"--shard-mib: expected at least 1, found {arguments.shard_mib}")
    shard_bytes = (arguments.shard_mib or bundle.SHARD_BYTES >> 20) << 20
    if arguments.source:
        if overrides or arguments.config or arguments.workdir:
            raise UserError("--from BUNDLE needs no workdir or config: leave out --workdir, --config and config keys")
        refuse_unread(arguments, "with --from", *PROCESSES)
        if image_tokenizer.is_one(Path(arguments.source)):
            refuse_unread(arguments, "for an image tokenizer", "license", "shard_mib")
            image_tokenizer.export_tokenizer(Path(arguments.source), arguments.to or "", arguments.output)
        else:
            _export_bundle(arguments, shard_bytes)
        return 0
    if not arguments.workdir:
        raise UserError("expected --workdir DIR of a training, or --from BUNDLE --to FORMAT; found neither")
    if arguments.to not in (ADAPTER, BESIDE):
        refuse_unread(arguments, "without --from, because the result is a bundle", "to")
    experiment = open_experiment(arguments, overrides, ["export"])
    if arguments.to == ADAPTER:
        refuse_unread(arguments, f"with --to {ADAPTER}, which writes only an adapter", "license", "shard_mib")
        export_adapter(experiment, arguments.output)
        return 0
    beside = arguments.to == BESIDE
    export(experiment, arguments.output, license=arguments.license, shard_bytes=shard_bytes, beside=beside)
    return 0


def _export_bundle(arguments: argparse.Namespace, shard_bytes: int) -> None:
    found, form = Bundle(arguments.source), arguments.to or FORMS[0]
    if found.published is not None:
        refuse_unread(arguments, "for published weights in their own form, which has no card", "license")
    if form != FORMS[0]:
        refuse_unread(arguments, f"with --to {form}, which writes as many files as were imported", "shard_mib")
    export_published(found, form, Path(arguments.output), shard_bytes, arguments.license)


@by_first_process
def export(
    experiment: Experiment,
    output: str,
    *,
    license: str = "",
    shard_bytes: int = bundle.SHARD_BYTES,
    beside: bool = False,
) -> None:
    """Writes the bundle of a finished training. Raises UserError if no training has finished, or if `output` exists and
    is not an empty folder.

    With `beside`, it writes the extended language model without the adapter.
    """
    extends = _require_extended(experiment) if beside else ""
    config, tokenizer = configs.plain(experiment.config), experiment.image_tokenizer
    image = None if isinstance(tokenizer, NoImages) else tokenizer
    evaluation, brought = None if beside else _evaluation(experiment), experiment.workdir.text_tokenizer
    words = card(
        name=Path(output).resolve().name,
        draws=image is not None and not draws_none(image),
        license=license,
        model=experiment.model,
        vocabulary=experiment.grammar.vocabulary,
        image=image.config if image else None,
        config=config,
        training=_training(experiment),
        evaluation=evaluation,
    )
    made = bundle.write(
        output,
        config=experiment.model,
        params=experiment.params_without_adapter if beside else experiment.params,
        grammar=experiment.grammar,
        text_tokenizer=experiment.text_tokenizer,
        image_tokenizer=image,
        data={name: config["data"][name] for name in (DATA if image else ("max_tokens",))}
        | (experiment.resize.way if image else {}),
        loss={name: config["loss"][name] for name in LOSS},
        sampling={name: config["sampling"][name] for name in _SAMPLING},
        card=words,
        published=_published(experiment, brought / bundle.PUBLISHED),
        kept=read_tensors(kept) if (kept := brought / bundle.KEPT).exists() else None,
        extends=extends,
        shard_bytes=shard_bytes,
    )
    experiment.say(
        f"{made.folder}: step {experiment.checkpoint}, {parameter_count(experiment.model) / 1e6:.2f}M parameters, "
        f"{made.size / 1e6:.1f} MB"
    )
    if evaluation is None:
        experiment.say("its card has no numbers: `ar-unified evaluate` has not scored these weights")
    if not license:
        experiment.say("its model card says that the licence is unknown; --license WORDS says which it is")


@by_first_process
def export_adapter(experiment: Experiment, output: str) -> None:
    """Writes the adapter of a finished training in PEFT's form. Raises UserError if no adapter was trained, or if other
    parameters were trained, too."""
    lora, trained, base = trained_adapter(experiment)
    rows = _rows(experiment, trained, ADAPTER)
    peft.write(output, base, lora, trained["lora"], rows, manifest_hash(experiment.grammar.manifest()))
    count = sum(leaf.size for leaf in jax.tree.leaves(trained))
    more = "".join(f", {len(ids):,} rows of {table}" for table, (ids, _) in rows.items())
    told = f"step {experiment.checkpoint}, an adapter of rank {lora.rank}{more}"
    experiment.say(f"{output}: {told}, {count:,} parameters")


def _require_extended(experiment: Experiment) -> str:
    """The hash of the language model that was extended. Raises UserError if parameters other than the adapter and its
    rows were trained, or if no language model was extended."""
    _, trained, base = trained_adapter(experiment)
    if experiment.before is None:
        raise UserError(
            f"--to {BESIDE}: expected a training that extends a language model by images. This training's adapter "
            f"belongs to the bundle {base.folder}, which has not changed: use that bundle"
        )
    _rows(experiment, trained, BESIDE)
    return base.hash


def _rows(experiment: Experiment, trained: Mapping[str, Json], form: str) -> dict[str, TokenRows]:
    """The rows that were trained together with the adapter, by table, with published ids if the model has them. Raises
    UserError if other parameters were trained, too.
    """
    parts = settings.trained(experiment.config, experiment.grammar.vocabulary, experiment.new_ids).parts or {}
    if more := sorted(path for path, runs in parts.items() if not path.startswith("lora.") and not runs):
        raise UserError(
            f"--to {form}: expected a training of only an adapter and rows of ids, but this one also trained all of "
            f"{', '.join(more)} (config.training.only). Leave out --to to write all of the model as a bundle"
        )
    border, found = getattr(experiment.grammar.text_codec, "border", None), {}
    for table in TABLES:
        if table in parts:
            ids = np.concatenate([np.arange(begin, end) for begin, end in parts[table]])
            ids = ids if border is None else np.asarray(border.theirs)[ids]
            order = np.argsort(ids)
            found[table] = TokenRows(ids[order], np.asarray(trained[table], np.float32)[order])
    return found


def _published(experiment: Experiment, path: Path) -> dict[str, Json] | None:
    """What an export to the published form needs, if there is such a form. If this training trained the head, the head
    is no longer marked as untrained.
    """
    if not path.exists():
        return None
    record = read_json(path)
    parts = settings.trained(experiment.config, experiment.grammar.vocabulary, experiment.new_ids).parts
    if parts is None or "head" in parts:
        record.pop("untrained", None)
    if experiment.before is not None:
        record[EXTENDED] = experiment.before.used
    return record


def _training(experiment: Experiment) -> dict[str, str]:
    """Facts about the training, for the model card."""
    workdir, checkpoint = experiment.workdir, experiment.checkpoint
    summary = read_json(workdir.model / "done.json")["summary"]
    metadata = Checkpoints(experiment.checkpoint_folder, readonly=True).metadata(checkpoint)
    facts = {"checkpoint": f"step {checkpoint} of {summary['steps']}"}
    if (loss := metadata.get("validation_loss")) is not None:
        facts["validation loss"] = f"{loss:.4f}"
    if "seconds" in summary:
        facts["time"] = f"{summary['seconds'] / 3600:.2f} hours of training"
    if init := experiment.trained().get("init"):
        facts["began with"] = f"the weights of bundle {init[:12]}"
    return facts


def _evaluation(experiment: Experiment) -> Mapping[str, Json] | None:
    """The content of evaluation.json if it was measured on the exported weights."""
    path, made = experiment.workdir.evaluation, recorded(experiment, "evaluation")
    of_these = made.get("model") == experiment.trained() and made.get("checkpoint_step") == experiment.checkpoint
    return read_json(path) if of_these and path.exists() else None
