"""Emoji by name: a transformer that memorises 1,644 images and their English names.

    python experiments/data/make_emoji.py --font FILE --names FILE --output datasets/noto-emoji
    ar-unified run --config experiments/emoji.py --workdir workdirs/emoji

make_emoji.py says where the font and the names come from; `emoji.py:path=DIR` reads another folder. There is no
held-out set, because the name of an emoji does not determine what it looks like. The aim is that images drawn for the
training names are recognisable.

Expected: 22 of 24 drawings recognisable, after 23 minutes on two cores (docs/results.md).
"""

from ml_collections import ConfigDict

from ar_unified.experiment.config import defaults, model, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """The config. arg: "path=DIR", the dataset's folder."""
    path = parse_arg(arg, path="datasets/noto-emoji")["path"]
    config = defaults()
    config.name = "emoji"
    made_by = f"python experiments/data/make_emoji.py --font FILE --names FILE --output {path}"
    source = ConfigDict(dict(kind="folder", path=path, files=("captions",), made_by=made_by))
    config.data.train = (source,)
    config.data.validation = (source,)  # the training names (see the module's docstring)
    config.data.image_size = (64, 64)

    config.text_tokenizer.vocab_size = 1024

    config.image_tokenizer.factor = 8
    config.image_tokenizer.patch = 4
    config.image_tokenizer.multipliers = (1, 2)
    config.image_tokenizer.blocks = (1, 1)
    config.image_tokenizer.width = 48
    config.image_tokenizer.levels = (8, 5, 5, 5)
    config.image_tokenizer.l1_weight = 0.5
    config.image_tokenizer.steps = 2500
    config.image_tokenizer.batch_size = 32

    config.model = model("2m", tie_embeddings=False)
    config.loss.prompt = 0.1
    config.training.sequence_length = 256
    config.training.batch_size = 16
    config.training.steps = 1800
    config.training.learning_rate = 3e-3
    config.training.b2 = 0.99
    config.training.flip_pairs = 0.0
    config.training.condition_dropout = 0.05
    config.training.weight_decay = 0.01
    config.training.log_every = 50
    config.training.checkpoint_every = 500
    config.sampling.max_length = 128
    config.sampling.guidance = 1.5
    config.sampling.image.temperature = 0.3
    config.evaluation.limit = 64
    return config
