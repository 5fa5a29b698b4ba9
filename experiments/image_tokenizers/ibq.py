"""IBQ, the family of Emu3.5's tokenizer: a large codebook of wide codes, and every position trains all codes.

    C=experiments/image_tokenizers/ibq.py:path=DIR,validation=DIR2,lpips=FILE,codes=16384
    ar-unified tokenizer --only image --config $C --workdir workdirs/ibq
    ar-unified evaluate --only tokenizer --config $C --workdir workdirs/ibq

Arguments: path=DIR and validation=DIR of images; lpips=FILE from convert_perceptual (without it, the loss is 1 -
MS-SSIM); codes=N (16384).

Source, published numbers, and what differs here: docs/image_tokenizers.md, "Published recipes".
"""

from ar_tokenizers.image.config import PRESETS
from ml_collections import ConfigDict

from ar_unified.experiment.config import defaults, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """The config. arg: the arguments above."""
    args = parse_arg(arg, path="images", validation=None, lpips=None, codes="16384")
    config = defaults()
    config.name = "ibq"
    config.data.train = (ConfigDict(dict(kind="images", path=args["path"])),)
    config.data.validation = (ConfigDict(dict(kind="images", path=args["validation"])),) if args["validation"] else ()
    config.data.image_size = (256, 256)
    config.evaluation.limit = 50_000

    tokenizer = config.image_tokenizer
    tokenizer.update(PRESETS["ibq_f16"])
    tokenizer.quantizer = "ibq"
    tokenizer.codes = int(args["codes"] or 16_384)
    tokenizer.code_dim = 256
    tokenizer.entropy = 0.05
    tokenizer.dtype = "bfloat16"
    tokenizer.l1_weight, tokenizer.l2_weight = 1.0, 0.0
    tokenizer.perceptual = "lpips" if args["lpips"] else "ms_ssim"
    tokenizer.perceptual_file = args["lpips"] or ""

    tokenizer.adversary.kind = "patch"
    tokenizer.adversary.loss = "non_saturating"
    tokenizer.adversary.weight = 0.1
    tokenizer.adversary.start = tokenizer.adversary.warmup = tokenizer.adversary.ramp = 0
    tokenizer.adversary.lecam = 0.05
    tokenizer.adversary.dtype = "bfloat16"

    tokenizer.crop, tokenizer.short_side, tokenizer.mirror = 256, 288, True
    tokenizer.steps = 1_650_000  # 330 epochs of ImageNet
    tokenizer.batch_size = 256
    tokenizer.learning_rate = 1e-4
    tokenizer.b1, tokenizer.b2, tokenizer.clip_norm = 0.5, 0.9, 0.0
    tokenizer.ema = 0.9999
    tokenizer.checkpoint_every = 5000
    return config
