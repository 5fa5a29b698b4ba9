"""MaskGIT's and MAGVIT's tokenizer: no attention, a StyleGAN discriminator with R1, ResNet features.

    C=experiments/image_tokenizers/maskgit.py:path=DIR,validation=DIR2,resnet=FILE
    ar-unified tokenizer --only image --config $C --workdir workdirs/maskgit
    ar-unified evaluate --only tokenizer --config $C --workdir workdirs/maskgit

Arguments: path=DIR and validation=DIR of images; resnet=FILE from convert_perceptual (without it, the loss compares the
discriminator's features); lecam=WEIGHT of MAGVIT's optional regulariser (0).

Source, published numbers, and what differs here: docs/image_tokenizers.md, "Published recipes".
"""

from ar_tokenizers.image.config import PRESETS
from ml_collections import ConfigDict

from ar_unified.experiment.config import defaults, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """The config. arg: the arguments above."""
    args = parse_arg(arg, path="images", validation=None, resnet=None, lecam="0")
    config = defaults()
    config.name = "maskgit"
    config.data.train = (ConfigDict(dict(kind="images", path=args["path"])),)
    config.data.validation = (ConfigDict(dict(kind="images", path=args["validation"])),) if args["validation"] else ()
    config.data.image_size = (256, 256)
    config.evaluation.limit = 50_000

    tokenizer = config.image_tokenizer
    tokenizer.update(PRESETS["maskgit_f16"])
    tokenizer.quantizer = "vq"
    tokenizer.codes = 1024
    tokenizer.code_dim = 256
    tokenizer.entropy = 0.1
    tokenizer.perceptual = "features" if args["resnet"] else "match"
    tokenizer.perceptual_weight = 0.1
    tokenizer.perceptual_file = args["resnet"] or ""

    tokenizer.adversary.kind = "style"
    tokenizer.adversary.layers = 6
    tokenizer.adversary.loss = "non_saturating"
    tokenizer.adversary.weight = 0.1
    tokenizer.adversary.start = tokenizer.adversary.warmup = tokenizer.adversary.ramp = 0
    tokenizer.adversary.r1 = 20.0
    tokenizer.adversary.lecam = float(args["lecam"] or 0)

    tokenizer.crop, tokenizer.short_side, tokenizer.mirror = 256, 288, True
    tokenizer.steps = 1_000_000
    tokenizer.batch_size = 256
    tokenizer.learning_rate = 1e-4
    tokenizer.b1, tokenizer.b2, tokenizer.clip_norm = 0.0, 0.99, 0.0
    tokenizer.ema = 0.999
    tokenizer.checkpoint_every = 5000
    return config
