"""LoRA on the shapes demo: an adapter for better answers to questions, while the model's weights do not change.

    ar-unified export --workdir workdirs/shapes --output shapes
    ar-unified run --config experiments/lora.py:from=shapes --workdir workdirs/lora
    ar-unified export --workdir workdirs/lora --to peft --output questions     # the adapter alone
    ar-unified export --workdir workdirs/lora --output shapes-questions        # a bundle with it in the weights

Arguments: from=BUNDLE, exported from experiments/shapes.py, finished or not; rank=N (8); steps=N (400).

Measured on 29 Nov 2026 with jax 0.10.2, on a bundle of the demo after 1,501 of 3,200 steps: the share of 400
held-out questions that it answers right is 0.848, and 0.890 with the adapter in the same engine. `evaluate` of the
merged weights also gives 0.890. The adapter has 81,920 parameters, the model 1.05M; the adapter's file has 328 KB, a
checkpoint 1.0 MB. 400 steps took 128 s of CPU time on 2 cores of a Xeon (20 minutes of wall time, because thirty other
processes shared the cores). Preparing the data took 20 s; the images had been encoded earlier.
"""

from ml_collections import ConfigDict

from ar_unified.experiment.config import begin_with, defaults, parse_arg, whole


def questions(split: str) -> tuple[ConfigDict, ...]:
    """Questions about images of a split."""
    return (ConfigDict(dict(kind="tfds", name="shapes/questions", split=split)),)


def get_config(arg: str | None = None) -> ConfigDict:
    """The config. arg: "from=BUNDLE,rank=8,steps=400". Raises ValueError without a bundle."""
    args = parse_arg(arg, **{"from": None, "rank": "8", "steps": "400"})
    if not args["from"]:
        raise ValueError("experiments/lora.py needs a bundle: experiments/lora.py:from=BUNDLE")
    config = defaults()
    config.name = "lora"
    config.data.train = questions("train")
    config.data.validation = questions("validation")
    begin_with(config, args["from"])

    config.lora.rank = whole("rank", args["rank"])
    config.lora.alpha = 2.0 * config.lora.rank
    config.training.steps = whole("steps", args["steps"])
    config.training.batch_size = 8
    config.training.learning_rate = 2e-3
    config.training.warmup_steps = 20
    config.training.weight_decay = 0.0
    config.training.b2 = 0.99
    config.training.log_every = 50
    config.training.validate_every = 200
    config.training.checkpoint_every = 200
    config.loss.prompt = 0.0  # loss only on the answers

    config.evaluation.protocol = "shapes"
    config.evaluation.limit = 400
    return config
