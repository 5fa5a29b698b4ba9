"""Write how likely documents, prompts with answers, or preference pairs are under the model.

PATH is a file or folder of documents in any form that `ar-unified validate` reads. JSONL is the simplest:
  {"prompt": "a red circle", "answer": [{"type": "image", "image": "a.png"}]}
  {"image": "a.png", "question": "What colour is it?", "answer": "red"}
  {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
  {"prompt": "a red circle", "chosen": ..., "rejected": ...}
Writes FILE, whole or not at all, with a line of JSON for each item, in order (ar_unified.evaluation.scoring). A line
has the log-likelihood of the answer in nats, its number of tokens, whether every token was the most likely one, and the
same by part and by modality. The line of a pair has this for both answers, and their difference. The line of an item
that cannot be used says what is wrong with it. If the command is killed, the finished lines stay in FILE.unfinished,
and the same command continues from there. The model comes from a workdir (config.sampling says which checkpoint, and
how many documents at once) or from a bundle:
  ar-unified score --from BUNDLE --data pairs.jsonl --output scores.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ar_unified.cli.arguments import PROCESSES, refuse_unread, require_workdir
from ar_unified.data.sources import Source, kind_of, open_source
from ar_unified.errors import UserError, about, saving_memory
from ar_unified.evaluation.scoring import score_source
from ar_unified.experiment.experiment import Experiment
from ar_unified.experiment.facts import weights_hash
from ar_unified.experiment.memory import OF_BUNDLE, REQUESTS, advice
from ar_unified.experiment.start import by_first_process, open_experiment
from ar_unified.sampling.model import Model, load


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Scores what --data has; returns the exit status. Raises UserError."""
    with about(f"--data {arguments.data}"):
        source = open_source(
            dict(kind=kind_of(arguments.data, arguments.links), path=arguments.data, links=arguments.links)
        )
    if arguments.source:
        if overrides or arguments.config or arguments.workdir:
            raise UserError("--from BUNDLE needs no workdir or config: leave out --workdir, --config and config keys")
        refuse_unread(arguments, "with --from", *PROCESSES)
        if arguments.batch_size is not None and arguments.batch_size < 1:
            raise UserError(f"--batch-size: expected at least 1, found {arguments.batch_size}")
        with saving_memory(lambda: OF_BUNDLE):
            model = load(arguments.source, batch_size=arguments.batch_size)
            print(f"{arguments.output}: {score_source(model, source, arguments.output)}")
        return 0
    require_workdir(arguments)
    refuse_unread(arguments, "with a workdir, which uses config.sampling.batch_size", "batch_size")
    experiment = open_experiment(arguments, overrides, ["requests"])
    with saving_memory(lambda: advice(REQUESTS, experiment.config)):
        score(experiment, source, arguments.output)
    return 0


@by_first_process
def score(experiment: Experiment, source: Source, output: str) -> None:
    """Scores a source with the experiment's model; `output` is the file to write."""
    model = Model(experiment.engine, experiment.image_tokenizer, experiment.resize, weights=weights_hash(experiment))
    experiment.say(f"{output}: {score_source(model, source, output)}")
