"""DPO on shapes: a partly trained demo learns from pairs of right and wrong pictures, and of right and wrong answers.

    python experiments/data/make_shape_pairs.py --output datasets/shape-pairs
    ar-unified run --config experiments/dpo.py:from=BUNDLE --workdir workdirs/dpo

BUNDLE is an export of experiments/shapes.py that was stopped early; here, after 504 of 3,200 steps.
Measured on 30 Nov 2026 with jax 0.10.2 on two cores that other processes shared, in 6 min 7 s: on 400 captions and 400
questions of the embedded validation split, text_to_image_exact rose from 0.753 to 0.905, and image_to_text_exact from
0.770 to 0.790. The learning rate is the best of three on these scores. docs/preference_tuning.md has the other two
learning rates, and runs that start from other steps of the demo. The SFT term alone does as well or better, and DPO
without it harms the model.
"""

from ml_collections import ConfigDict

from ar_unified.experiment.config import begin_with, defaults, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """The config. arg: "from=BUNDLE,path=DIR", DIR with the pairs. Raises ValueError without a bundle."""
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
    config.training.steps = 240
    config.training.batch_size = 16
    config.training.sequence_length = 256
    config.training.optimizer = "adamw"
    config.training.learning_rate = 7e-4
    config.training.warmup_steps = 20
    config.training.weight_decay = 0.0
    config.training.log_every = 10
    config.training.validate_every = 60
    config.training.checkpoint_every = 60
    config.training.keep_best = False

    config.evaluation.protocol = "shapes"
    config.evaluation.limit = 400
    return config
