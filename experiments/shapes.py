"""The demo on the embedded shapes dataset: both tokenizers, the transformer, samples and their scores.

    make demo      or      ar-unified demo --workdir workdirs/shapes

Expected shares of right results for held-out scenes: drawings 1.0, questions 0.95, captions 0.99, stories 0.83, after
12 to 25 minutes on two cores, with 1.3 GB of memory (docs/results.md).
"""

from ml_collections import ConfigDict

from ar_unified.experiment.config import defaults, model

WEIGHTS = {"captions": 0.18, "questions": 0.44, "stories": 0.38}  # shares of the packed rows


def sources(split: str) -> tuple[ConfigDict, ...]:
    """The sources of a split for the three kinds of documents, with their weights."""
    return tuple(
        ConfigDict(dict(kind="tfds", name=f"shapes/{kind}", split=split, weight=weight))
        for kind, weight in WEIGHTS.items()
    )


def get_config() -> ConfigDict:
    """The config; it takes no argument."""
    config = defaults()
    config.name = "shapes"

    config.data.train = sources("train")
    config.data.validation = sources("validation")
    config.data.tests.unseen_combinations = sources("unseen_combinations")
    config.data.image_size = (64, 64)

    config.image_tokenizer.factor = 16  # 4 x 4 codes per image
    config.image_tokenizer.patch = 4
    config.image_tokenizer.width = 32
    config.image_tokenizer.multipliers = (1, 2, 4)
    # Residual blocks only at fine levels, so that a code depends little on other places. A code that depends on
    # others is hard to predict.
    config.image_tokenizer.blocks = (2, 0, 0)
    config.image_tokenizer.levels = (8, 8, 8)
    config.image_tokenizer.activation = "ifsq"
    config.image_tokenizer.l1_weight = 0.5
    config.image_tokenizer.recolour = 0.3  # so that no code stands for only one combination of shape and colour
    config.image_tokenizer.tolerance = 0.04
    config.image_tokenizer.steps = 1500
    config.image_tokenizer.batch_size = 16
    config.image_tokenizer.learning_rate = 4e-3

    config.model = model(
        "2m", d_model=128, n_heads=4, n_kv_heads=4, d_mlp=384, tie_embeddings=False, rope_theta=1e3, dtype="bfloat16"
    )
    config.loss.prompt = 0.1
    config.loss.roles.text = 0.5
    config.loss.tasks.image_to_text = 6.0
    config.loss.z_loss = 1e-4
    config.training.steps = 2900
    config.training.batch_size = 8
    config.training.sequence_length = 256
    config.training.optimizer = "muon"
    config.training.code_embedding_init = "codebook"
    config.training.learning_rate = 2e-3
    config.training.warmup_steps = 60
    config.training.b2 = 0.99
    config.training.weight_decay = 0.01
    config.training.flip_pairs = 0.35
    config.training.condition_dropout = 0.05
    config.training.log_every = 50
    config.training.validate_every = 1000
    config.training.checkpoint_every = 500

    config.sampling.max_length = 192
    config.sampling.image.temperature = 0.25
    config.evaluation.protocol = "shapes"
    config.evaluation.limit = 400
    config.evaluation.thresholds = ConfigDict(
        dict(text_to_image_exact=0.90, image_to_text_exact=0.90, story_change_exact=0.80, parse_rate=1.0)
    )
    return config
