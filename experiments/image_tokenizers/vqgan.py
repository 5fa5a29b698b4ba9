"""VQGAN f16, the first tokenizer of this kind: 16 x 16 codes for a 256-pixel image, trained with a discriminator.

    C=experiments/image_tokenizers/vqgan.py:path=DIR,validation=DIR2,lpips=FILE
    ar-unified tokenizer --only image --config $C --workdir workdirs/vqgan
    ar-unified evaluate --only tokenizer --config $C --workdir workdirs/vqgan

Arguments: path=DIR and validation=DIR of images; lpips=FILE from convert_perceptual (without it, the loss is 1 -
MS-SSIM, which needs no pretrained network); codes=N (1024).

Source, published numbers, and what differs here: docs/image_tokenizers.md, "Published recipes".
"""

from ar_tokenizers.image.config import PRESETS
from ml_collections import ConfigDict

from ar_unified.experiment.config import defaults, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """The config. arg: the arguments above."""
    args = parse_arg(arg, path="images", validation=None, lpips=None, codes="1024")
    config = defaults()
    config.name = "vqgan"
    config.data.train = (ConfigDict(dict(kind="images", path=args["path"])),)
    config.data.validation = (ConfigDict(dict(kind="images", path=args["validation"])),) if args["validation"] else ()
    config.data.image_size = (256, 256)
    config.evaluation.limit = 50_000

    tokenizer = config.image_tokenizer
    tokenizer.update(PRESETS["taming_f16"])
    tokenizer.quantizer = "vq"
    tokenizer.codes = int(args["codes"] or 1024)
    tokenizer.code_dim = 256
    tokenizer.restart = 0.0
    tokenizer.l1_weight, tokenizer.l2_weight = 1.0, 0.0
    tokenizer.perceptual = "lpips" if args["lpips"] else "ms_ssim"
    tokenizer.perceptual_file = args["lpips"] or ""

    tokenizer.adversary.kind = "patch"
    tokenizer.adversary.adaptive = True
    tokenizer.adversary.weight = 0.8
    tokenizer.adversary.start = 250_000
    tokenizer.adversary.warmup = 5000
    tokenizer.adversary.ramp = 5000

    tokenizer.crop, tokenizer.short_side, tokenizer.mirror = 256, 288, True
    tokenizer.steps = 500_000
    tokenizer.batch_size = 12
    tokenizer.learning_rate = 5.4e-5
    tokenizer.final_fraction = 1.0
    tokenizer.b1, tokenizer.b2, tokenizer.clip_norm = 0.5, 0.9, 0.0
    tokenizer.checkpoint_every = 5000
    return config
