"""GRPO on the shapes demo: the model learns to draw the right pictures from the rewards of the demo's pixel checker.

    ar-unified run --config experiments/grpo.py:from=BUNDLE --workdir workdirs/grpo

BUNDLE is an exported demo (`ar-unified export --workdir workdirs/shapes --output BUNDLE`), preferably one that was
stopped early, because a finished demo draws a share of 0.99 right and has little to learn.

Measured on 30 Nov 2026 with jax 0.10.2, from the demo after 504 of 3,200 steps: the share of held-out captions that
are drawn right rises from 0.735 (of 200 captions) to 0.973 (of 400 captions; temperature 0.25). caption_exact, which no
reward measures, falls from 0.55 to 0.24. The run took 14 min 1 s on 2 cores that tests also used. docs/rewards.md has
the curve. It also has the curve of the demo with its former image tokenizer, which rose from 0.565 to 0.850.

    python experiments/data/make_unseen_prompts.py --output datasets/unseen-prompts
    ar-unified run --config experiments/grpo.py:from=BUNDLE,unseen=datasets/unseen-prompts --workdir workdirs/unseen

The second command trains on prompts for shapes in colours that no training image has. Here BUNDLE is a model of
experiments/apart.py. The share of 400 captions that are drawn right rises from 0.008 to 0.765, and for held-out scenes
from 0.863 to 0.905 (30 Nov 2026, 720 steps, 29 min on 2 cores that tests also used).
"""

from ml_collections import ConfigDict

from ar_unified.experiment.config import begin_with, defaults, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """The config. arg: "from=BUNDLE,unseen=DIR", DIR with prompts. Raises ValueError without a bundle."""
    args = parse_arg(arg, **{"from": None, "unseen": None})
    if not args["from"]:
        raise ValueError("experiments/grpo.py needs a model: --config experiments/grpo.py:from=BUNDLE")
    config = defaults()
    config.name = "grpo"

    def captions(split: str) -> tuple[ConfigDict, ...]:
        return (ConfigDict(dict(kind="tfds", name="shapes/captions", split=split, weight=1.0)),)

    config.data.train = captions("train")
    config.data.validation = captions("validation")
    begin_with(config, args["from"])

    config.training.objective = "reward"
    config.reward.function = "shapes"
    if args["unseen"]:
        made_by = f"python experiments/data/make_unseen_prompts.py --output {args['unseen']}"
        file = f"{args['unseen']}/prompts.jsonl"
        prompts = ConfigDict(dict(kind="jsonl", path=file, made_by=made_by, weight=0.4))
        # Captions of seen combinations, because the model would forget how to draw them.
        config.data.train = (prompts, ConfigDict(dict(captions("train")[0], weight=0.6)))
        config.data.tests.unseen_combinations = captions("unseen_combinations")
        config.reward.function = "shapes_closeness"
        config.reward.mode = "image"  # without this, the mode comes from a prompt's answer, but these prompts have none
    config.reward.group_size = 16
    config.reward.scale_rewards = False
    config.reward.clip_high = 0.28
    config.training.batch_size = 128  # 8 prompts per step
    # One answer per row: a caption of at most 29 pieces, and an image of 16 codes (32 in experiments/apart.py).
    config.training.sequence_length = 72 if args["unseen"] else 56
    config.training.steps = 720 if args["unseen"] else 600
    config.training.optimizer = "adamw"
    config.training.learning_rate = 3e-4
    config.training.schedule = "wsd"
    config.training.warmup_steps = 5
    config.training.weight_decay = 0.0
    config.training.b2 = 0.99
    config.training.log_every = 5
    config.training.checkpoint_every = 20

    config.sampling.batch_size = 128
    config.sampling.image.temperature = 0.25
    config.evaluation.protocol = "shapes"
    config.evaluation.limit = 400
    config.evaluation.thresholds = ConfigDict(dict(text_to_image_exact=0.85, parse_rate=1.0))
    return config
