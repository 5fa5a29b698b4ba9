"""An image tokenizer of photographs and emoji that a CPU can train: f8, 15,360 codes, 1.45M parameters.

    C=experiments/photos.py:path=DIR
    ar-unified tokenizer --only image --config $C --workdir workdirs/photos
    ar-unified evaluate --only tokenizer --config $C --workdir workdirs/photos

DIR holds the folders clothing (1,000 photographs, short side 128), noto-emoji (1,644 pictures of 128 x 128) and
based-cooking (133 photographs) for training, and kodak (8 photographs of 768 x 512) to be tested on: none of it is seen
in training. The aim is 21 dB on kodak at 256 x 256 within an hour. It has not been run to its end yet: of 6,000 steps
the first 1,300 took 9 minutes of CPU time and came to a loss of 0.031 on training crops.

Argument: path=DIR.
"""

from ml_collections import ConfigDict

from ar_unified.cli.config import defaults, parse_arg

TRAIN = {"clothing": 0.6, "based-cooking": 0.25, "noto-emoji": 0.15}  # shares of the crops


def get_config(arg: str | None = None) -> ConfigDict:
    path = parse_arg(arg, path="../shared/data")["path"]
    config = defaults()
    config.name = "photos"

    def pictures(name: str, **more: float) -> ConfigDict:
        return ConfigDict(dict(kind="pictures", path=f"{path}/{name}", **more))

    config.data.train = tuple(pictures(name, picture_weight=share) for name, share in TRAIN.items())
    config.data.validation = (pictures("kodak"),)
    config.data.image_size = (256, 256)

    tokenizer = config.image_tokenizer
    tokenizer.factor = 8
    tokenizer.patch = 4
    tokenizer.width = 64
    tokenizer.multipliers = (1, 2)
    tokenizer.blocks = (1, 2)
    tokenizer.levels = (8, 8, 8, 6, 5)
    tokenizer.crop, tokenizer.short_side, tokenizer.mirror = 64, 128, True
    tokenizer.steps = 10_000
    tokenizer.batch_size = 16
    tokenizer.learning_rate = 2e-3
    tokenizer.warmup_steps = 200
    tokenizer.ema = 0.999
    tokenizer.checkpoint_every = 1000
    return config
