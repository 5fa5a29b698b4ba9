"""SBER-MoVQGAN, the origin of Emu3's tokenizer: f8, 32 x 32 codes of a 256-pixel image, 270M parameters.

    C=experiments/image_tokenizers/emu3.py:path=DIR,validation=DIR2,lpips=FILE
    ar-unified tokenizer --only image --config $C --workdir workdirs/emu3
    ar-unified evaluate --only tokenizer --config $C --workdir workdirs/emu3

Arguments: path=DIR and validation=DIR of images; lpips=FILE from convert_perceptual (without it, the loss is 1 -
MS-SSIM); codes=N (32768).

Source, published numbers, and what differs here: docs/image_tokenizers.md, "Published recipes".
"""

from ar_tokenizers.image.config import PRESETS
from ml_collections import ConfigDict

from ar_unified.experiment.config import defaults, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """The config. arg: the arguments above."""
    args = parse_arg(arg, path="images", validation=None, lpips=None, codes="32768")
    config = defaults()
    config.name = "emu3"
    config.data.train = (ConfigDict(dict(kind="images", path=args["path"])),)
    config.data.validation = (ConfigDict(dict(kind="images", path=args["validation"])),) if args["validation"] else ()
    config.data.image_size = (256, 256)
    config.evaluation.limit = 50_000

    tokenizer = config.image_tokenizer
    tokenizer.update(PRESETS["emu3_f8"])
    tokenizer.quantizer = "vq"
    tokenizer.codes = int(args["codes"] or 32_768)
    tokenizer.code_dim = 4
    tokenizer.l1_weight, tokenizer.l2_weight = 1.0, 0.0
    tokenizer.perceptual = "lpips" if args["lpips"] else "ms_ssim"
    tokenizer.perceptual_file = args["lpips"] or ""

    tokenizer.adversary.kind = "patch"
    tokenizer.adversary.layers = 2
    tokenizer.adversary.adaptive = True
    tokenizer.adversary.weight = 0.8
    tokenizer.adversary.start = tokenizer.adversary.warmup = 1
    tokenizer.adversary.ramp = 1000

    tokenizer.crop, tokenizer.short_side, tokenizer.mirror = 256, 288, True
    tokenizer.steps = 2_000_000
    tokenizer.batch_size = 64
    tokenizer.learning_rate = 1e-4
    tokenizer.b1, tokenizer.b2 = 0.9, 0.99
    tokenizer.ema = 0.9999
    tokenizer.checkpoint_every = 5000
    return config
