"""LlamaGen's VQ-16: VQGAN's network, 16,384 codes of 8 dimensions on the unit sphere, 72M parameters.

    C=experiments/image_tokenizers/llamagen.py:path=DIR,validation=DIR2,lpips=FILE
    ar-unified tokenizer --only image --config $C --workdir workdirs/llamagen
    ar-unified evaluate --only tokenizer --config $C --workdir workdirs/llamagen

Arguments: path=DIR and validation=DIR of images; lpips=FILE from convert_perceptual (without it, the loss is 1 -
MS-SSIM).

Source, published numbers, and what differs here: docs/image_tokenizers.md, "Published recipes".
"""

from ar_tokenizers.image.config import PRESETS
from ml_collections import ConfigDict

from ar_unified.experiment.config import defaults, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """The config. arg: the arguments above."""
    args = parse_arg(arg, path="images", validation=None, lpips=None)
    config = defaults()
    config.name = "llamagen"
    config.data.train = (ConfigDict(dict(kind="images", path=args["path"])),)
    config.data.validation = (ConfigDict(dict(kind="images", path=args["validation"])),) if args["validation"] else ()
    config.data.image_size = (256, 256)
    config.evaluation.limit = 50_000

    tokenizer = config.image_tokenizer
    tokenizer.update(PRESETS["taming_f16"])
    tokenizer.quantizer = "vq"
    tokenizer.codes = 16_384
    tokenizer.code_dim = 8
    tokenizer.dtype = "bfloat16"
    tokenizer.perceptual = "lpips" if args["lpips"] else "ms_ssim"
    tokenizer.perceptual_file = args["lpips"] or ""

    tokenizer.adversary.kind = "patch"
    tokenizer.adversary.weight = 0.5
    tokenizer.adversary.start = 20_000
    tokenizer.adversary.warmup = 2000
    tokenizer.adversary.ramp = 2000
    tokenizer.adversary.dtype = "bfloat16"

    tokenizer.crop, tokenizer.short_side, tokenizer.mirror = 256, 282, True
    tokenizer.steps = 400_000
    tokenizer.batch_size = 128
    tokenizer.learning_rate = 1e-4
    tokenizer.final_fraction = 1.0
    tokenizer.b1, tokenizer.b2 = 0.9, 0.95
    tokenizer.ema = 0.9999
    tokenizer.checkpoint_every = 5000
    return config
