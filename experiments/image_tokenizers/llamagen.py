"""LlamaGen's VQ-16: VQGAN's network, 16,384 codes of 8 numbers on the unit sphere, 72M parameters.

    C=experiments/image_tokenizers/llamagen.py:path=DIR,validation=DIR2,lpips=FILE
    ar-unified tokenizer --only image --config $C --workdir workdirs/llamagen
    ar-unified evaluate --only tokenizer --config $C --workdir workdirs/llamagen

Sun et al. 2024, arXiv:2406.06525; LlamaGen, tokenizer/tokenizer_image/vq_train.py. Published, ImageNet validation at
256 pixels, not by us: rFID 2.19, 20.79 dB, 97 % of the codes in use; somebody else's training (xyfJASON/
visual-tokenizer-pytorch, 400,000 steps of 128): rFID 2.107, 20.72 dB, SSIM 0.551, LPIPS 0.1385, 100 %.

Theirs: L2 and LPIPS at weight 1, patch discriminator with hinge loss at a fixed 0.5 from step 20,000, Adam (0.9, 0.95)
at a constant 1e-4, clipped at 1, bfloat16, averaged weights. Different here: the discriminator learns for 2,000 steps
before, and is felt over the next 2,000; group norm in it; codes that are not used are restarted. VQ-8 is
`--config.image_tokenizer.factor=8` with taming_f8's multipliers and blocks.

Arguments: path=DIR and validation=DIR of images; lpips=FILE that convert_perceptual wrote (none: 1 - MS-SSIM in
its place).
"""

from ar_tokenizers.image.config import PRESETS
from ml_collections import ConfigDict

from ar_unified.experiment.config import defaults, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
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
