"""An image tokenizer of photographs and emoji that a CPU can train: f8, 15,360 codes, 1.45M parameters.

    C=experiments/photos.py
    ar-unified tokenizer --only image --config $C --workdir workdirs/photos
    ar-unified evaluate --only tokenizer --config $C --workdir workdirs/photos

data/make_photos.py and data/make_emoji.py fill the folder `datasets` (or DIR of photos.py:path=DIR) from public sources
that they name. clothing (1,000 photographs, short side 128 pixels), noto-emoji (1,644 images of 128 x 128) and
based-cooking (133 photographs) are for training. kodak (8 photographs of 768 x 512) is for testing, and never seen in
training.

Expected: a PSNR of 24.6 dB on kodak at 256 x 256, after 34 minutes on two cores (docs/image_tokenizers.md).

Arguments: path=DIR, the folder above (datasets), or a folder of your own photographs to train on; validation=DIR2,
another folder of photographs for scoring (default: kodak, or none for your own photographs).
"""

from pathlib import Path

from ml_collections import ConfigDict

from ar_unified.experiment.config import defaults, parse_arg

TRAIN = {"clothing": 0.6, "based-cooking": 0.25, "noto-emoji": 0.15}  # shares of the crops for training
MADE_BY = {
    "clothing": "make_photos.py --clothing CLONE --output {path}",
    "based-cooking": "make_photos.py --cooking CLONE --output {path}",
    "kodak": "make_photos.py --kodak CLONE --output {path}",
    "noto-emoji": "make_emoji.py --font FILE --names FILE --output {path}/noto-emoji",
}


def is_of_ones_own(path: str) -> bool:
    """Whether a path is a folder with none of the sets that the scripts in data/ make."""
    folder = Path(path)
    return folder.is_dir() and not any((folder / name).exists() for name in MADE_BY)


def get_config(arg: str | None = None) -> ConfigDict:
    """The config. arg: the arguments above."""
    args = parse_arg(arg, path="datasets", validation=None)
    path, held_out = args["path"], args["validation"]
    config = defaults()
    config.name = "photos"

    def images(name: str, **more: float) -> ConfigDict:
        made_by = f"python experiments/data/{MADE_BY[name].format(path=path)}"
        return ConfigDict(dict(kind="images", path=f"{path}/{name}", made_by=made_by, **more))

    if held_out or is_of_ones_own(str(path)):
        config.data.train = (ConfigDict(dict(kind="images", path=path)),)
        config.data.validation = (ConfigDict(dict(kind="images", path=held_out)),) if held_out else ()
    else:
        config.data.train = tuple(images(name, image_weight=share) for name, share in TRAIN.items())
        config.data.validation = (images("kodak"),)
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
