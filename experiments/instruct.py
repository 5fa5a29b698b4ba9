"""Instruction tuning on conversations about pictures, in which the assistant answers in words and draws.

    ar-unified run --config experiments/instruct.py:from=BUNDLE --workdir workdirs/instruct

BUNDLE is an exported demo (`ar-unified export --workdir workdirs/shapes --output BUNDLE`).

Measured on 29 Nov 2026 with jax 0.10.2, from the finished demo, with prepared data: 6 min 15 s on 2 cores with other
processes, 6 min 46 s of CPU time. 300 held-out conversations, each continued with the model's own answers, gave
turn_exact 0.715 of 912 turns (draw 0.978, question 0.907, describe 0.775, follow_up 0.679, before 0.528, edit 0.349,
edit_it 0.242), conversation_exact 0.427, turn_reconstruction_exact 1.0. The demo's skills after tuning:
text_to_image_exact 0.977, image_to_text_exact 0.947, caption_exact 0.953. docs/instruction_tuning.md says what limits
the numbers.
"""

from ml_collections import ConfigDict

from ar_unified.experiment.config import begin_with, defaults, parse_arg

WEIGHTS = {"conversations": 0.85, "captions": 0.05, "questions": 0.1}  # shares of the packed rows


def get_config(arg: str | None = None) -> ConfigDict:
    """The config. arg: "from=BUNDLE". Raises ValueError without one."""
    args = parse_arg(arg, **{"from": None})
    if not args["from"]:
        raise ValueError("experiments/instruct.py needs a model: --config experiments/instruct.py:from=BUNDLE")
    config = defaults()
    config.name = "instruct"

    def sources(split: str, *names: str) -> tuple[ConfigDict, ...]:
        return tuple(
            ConfigDict(dict(kind="tfds", name=f"shapes/{name}", split=split, weight=WEIGHTS[name])) for name in names
        )

    config.data.train = sources("train", *WEIGHTS)
    config.data.validation = sources("validation", *WEIGHTS)
    config.data.tests.unseen_combinations = sources("unseen_combinations", "conversations")
    config.data.max_tokens = 256
    begin_with(config, args["from"])

    config.loss.prompt = 0.0  # loss only on what the assistant says
    config.loss.roles.text = 2.0  # answers have few tokens, pictures sixteen
    config.training.steps = 1000
    config.training.batch_size = 8
    config.training.sequence_length = 256
    config.training.optimizer = "muon"
    config.training.learning_rate = 2e-3
    config.training.warmup_steps = 20
    config.training.b2 = 0.99
    config.training.weight_decay = 0.01
    config.training.flip_pairs = 0.0
    config.training.condition_dropout = 0.0
    config.training.log_every = 50
    config.training.validate_every = 250
    config.training.checkpoint_every = 250

    config.sampling.max_length = 288
    config.sampling.image.temperature = 0.25
    config.evaluation.protocol = "shapes"
    config.evaluation.limit = 300
    config.evaluation.thresholds = ConfigDict(dict(turn_exact=0.65, parse_rate=1.0))
    return config
