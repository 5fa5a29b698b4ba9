"""Pretrain a model of a published shape on your own folder, on a TPU slice or a GPU cluster.

    ar-unified plan  --config experiments/pretrain.py:model=chameleon_7b,chips=64 --target v5p:4x4x4
    ar-unified run   --config experiments/pretrain.py:model=chameleon_7b,chips=64,path=DIR --workdir DIR

Run `plan` first; it needs no data and no hardware. It says what is in a device's memory, how much is sent over the
network, and the least time of a step. docs/planning.md has a table of its answers for the models and slices below.

Arguments: model=chameleon_7b | chameleon_34b | emu3_8b | lwm_7b; chips=NUMBER of devices (64), which determines the
batch size; path=DIR, documents in the form that experiments/folder.py reads (only for training).

The models' shapes and vocabularies are published, and for Chameleon also the optimizer (arXiv 2405.09818, table 1:
learning rate 1e-4, z-loss 1e-5, clipping at 1). The mesh is ours. Its axis fsdp has at most half of its largest
possible size, because over a whole 3-D slice libtpu gathers with all-reduces, which send twice the bytes. The rows per
chip are chosen so that matmuls bound the time of a step. No such run has been made: these are plans, not results.
"""

from dataclasses import dataclass

from ml_collections import ConfigDict

from ar_unified.experiment import settings
from ar_unified.experiment.config import defaults, model, parse_arg, whole
from ar_unified.model.config import PRESETS


@dataclass(frozen=True)
class Recipe:
    """The sizes of one published system, and how it is divided over devices.

    Attributes:
      side, factor: pixels along the side of an image and of a code.
      codes: the size of the codebook.
      layout: a name of language.layouts.
      sequence_length: tokens in a packed row.
      rows: packed rows per chip, or per group of chips that share rows under context parallelism.
      remat: chosen to fit into the memory of the chips in docs/planning.md's table.
    """

    side: int
    factor: int
    codes: int
    layout: str
    sequence_length: int
    rows: int
    fsdp: int
    remat: str
    context: int = 1
    document: int = 4096
    learning_rate: float = 1e-4
    dropout: float = 0.0


RECIPES = {
    "chameleon_7b": Recipe(512, 16, 8192, "grid", sequence_length=4096, rows=4, fsdp=32, remat="dots", dropout=0.1),
    "chameleon_34b": Recipe(512, 16, 8192, "grid", sequence_length=4096, rows=2, fsdp=64, remat="attention"),
    "emu3_8b": Recipe(512, 8, 32768, "rows", sequence_length=8192, rows=3, fsdp=32, remat="full", document=8192),
    "lwm_7b": Recipe(
        256, 16, 8192, "grid", sequence_length=131072, rows=1, fsdp=32, remat="dots", context=16, document=131072
    ),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The config. arg: the arguments above. Raises ValueError, which names a wrong argument."""
    args = parse_arg(arg, model="chameleon_7b", chips="64", path="DIR")
    name = str(args["model"])
    if name not in RECIPES:
        raise ValueError(f"experiments/pretrain.py: expected model={' | '.join(RECIPES)}; found {name!r}")
    recipe, chips = RECIPES[name], whole("chips", args["chips"])
    fsdp = min(recipe.fsdp, max(chips // recipe.context // 2, 1))
    if fsdp < 1 or chips % (fsdp * recipe.context):
        raise ValueError(f"experiments/pretrain.py: {chips} chips do not divide by {recipe.context} x {fsdp}")
    config = defaults()
    config.name = name

    def source(split: str) -> tuple[ConfigDict, ...]:
        return (ConfigDict(dict(kind="folder", path=args["path"], split=split)),)

    config.data.train = source("[:99%]")
    config.data.validation = source("[99%:]")
    config.data.image_size = (recipe.side, recipe.side)
    config.data.layout = recipe.layout
    config.data.resize = "aspect" if recipe.layout == "rows" else "crop"
    config.data.max_tokens = recipe.document

    levels = (recipe.factor // 4).bit_length()  # one level for patches of 4 x 4, and one more for each halving
    config.image_tokenizer.factor = recipe.factor
    config.image_tokenizer.patch = 4
    config.image_tokenizer.width = 128
    config.image_tokenizer.multipliers = (1, 2, 4)[-levels:]
    config.image_tokenizer.blocks = (2,) * levels
    config.image_tokenizer.quantizer = "vq"
    config.image_tokenizer.codes = recipe.codes
    config.image_tokenizer.crop = 256
    config.image_tokenizer.steps = 100_000
    config.image_tokenizer.batch_size = 256

    vocabulary, _ = settings.language(config, settings.autoencoder(config), text_size=1)
    others = vocabulary.image_offset + vocabulary.codebook_size - vocabulary.text_size
    config.text_tokenizer.vocab_size = PRESETS[name]["vocab_size"] - others

    config.model = model(name, dropout=recipe.dropout, remat=recipe.remat)
    config.mesh = ConfigDict(dict(data=-1, fsdp=fsdp, tensor=1, context=recipe.context))
    config.loss.z_loss = 1e-5
    config.loss.chunk = 4096  # large, because the head's float32 gradient is read and written once per chunk
    config.training.steps = 200_000
    config.training.batch_size = recipe.rows * chips // recipe.context
    config.training.sequence_length = recipe.sequence_length
    config.training.learning_rate = recipe.learning_rate
    config.training.warmup_steps = 4000
    config.training.validate_every = 1000
    config.training.checkpoint_every = 500

    config.sampling.batch_size = 4 * chips // recipe.context
    config.sampling.max_length = min(recipe.sequence_length, 8192)
    config.sampling.guidance = 3.0
    config.evaluation.limit = 256
    return config
