"""DPO on shapes: a half-trained demo learns from pairs of right and wrong pictures, and of right and wrong answers.

python experiments/data/make_shape_pairs.py --output datasets/shape-pairs
ar-unified run --config experiments/dpo.py:from=BUNDLE --workdir workdirs/dpo
"""

from ml_collections import ConfigDict

from ar_unified.experiment.config import begin_with, defaults, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """The config. arg: "from=BUNDLE,path=DIR" of the pairs. Raises ValueError without a bundle."""
    args = parse_arg(arg, **{"from": None, "path": "datasets/shape-pairs"})
    if not args["from"]:
        raise ValueError("experiments/dpo.py needs the model to be tuned: --config experiments/dpo.py:from=BUNDLE")
    config = defaults()
    config.name = "dpo"
    begin_with(config, args["from"])

    def pairs(split: str) -> tuple[ConfigDict, ...]:
        made_by = f"python experiments/data/make_shape_pairs.py --output {args['path']}"
        return (ConfigDict(dict(kind="jsonl", path=f"{args['path']}/pairs.jsonl", split=split, made_by=made_by)),)

    def shapes(kind: str) -> ConfigDict:
        return ConfigDict(dict(kind="tfds", name=f"shapes/{kind}", split="validation"))

    config.data.train = pairs("train")
    config.data.validation = pairs("validation")
    config.data.tests.shapes = (shapes("captions"), shapes("questions"))
    config.data.max_tokens = 128

    config.training.objective = "preference"
    config.preference.loss = "dpo"
    config.preference.beta = 0.1
    config.preference.sft = 1.0
    config.training.steps = 150
    config.training.batch_size = 16
    config.training.sequence_length = 256
    config.training.optimizer = "adamw"
    config.training.learning_rate = 5e-4
    config.training.warmup_steps = 20
    config.training.weight_decay = 0.0
    config.training.log_every = 10
    config.training.validate_every = 50
    config.training.checkpoint_every = 50
    config.training.keep_best = False

    config.evaluation.protocol = "shapes"
    config.evaluation.limit = 400
    return config
