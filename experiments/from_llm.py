"""A text model learns to draw shapes, compared with the same small model trained from random weights.

    ar-unified run --config experiments/from_llm.py:part=text --workdir workdirs/llm
    ar-unified export --workdir workdirs/llm --output workdirs/llm_bundle
    ar-unified run --config experiments/from_llm.py:part=extend,from=workdirs/llm_bundle --workdir workdirs/extended
    ar-unified run --config experiments/from_llm.py:part=scratch,from=workdirs/llm_bundle --workdir workdirs/scratch

Arguments: part=text trains the language model; part=extend teaches it to draw; part=scratch does the same with the
model shape, text tokenizer and data of `extend`, from random weights. from=BUNDLE is the language model, from part=text
or from `ar-unified import --as llama | qwen | gemma`. images=FOLDER is an image tokenizer; without it, one is trained
here.

Measured on 29 Nov 2026, 400 steps each, with the demo's image tokenizer. Held-out losses in nats per token: text 0.748
before part=extend, 0.754 after it (part=scratch: 0.771); captioned images 1.348 after 100 steps and 0.808 at the end
(part=scratch: 1.385 and 0.808). Each of the three trainings took 48 s of CPU time. docs/from_llm.md has both curves.
"""

from ml_collections import ConfigDict

from ar_unified.experiment.brought import describe
from ar_unified.experiment.config import begin_with, defaults, model, parse_arg

PARTS = ("text", "extend", "scratch")
REHEARSED = 0.2  # share of rows with the texts of part=text
PARTS_OF = {"train": "train[:25%]", "validation": "validation"}  # enough for a model as small as this


def texts(split: str, weight: float) -> tuple[ConfigDict, ...]:
    """Captions, and questions with answers, without images."""
    columns = {"captions": {"text": "text"}, "questions": {"text": "{question} {answer}"}}
    return tuple(
        ConfigDict(
            dict(
                kind="tfds",
                name=f"shapes/{name}",
                label=f"text of {name}",
                split=PARTS_OF[split],
                weight=weight / 2,
                columns=found,
            )
        )
        for name, found in columns.items()
    )


def pictures(split: str, weight: float) -> tuple[ConfigDict, ...]:
    """Captioned images of a split."""
    return (ConfigDict(dict(kind="tfds", name="shapes/captions", split=PARTS_OF[split], weight=weight)),)


def get_config(arg: str | None = None) -> ConfigDict:
    """The config. arg: the arguments above. Raises ValueError if they do not fit together."""
    args = parse_arg(arg, part="text", images=None, **{"from": None})
    part, bundle = args["part"], args["from"]
    if part not in PARTS or (part == "text") != (bundle is None):
        raise ValueError(
            f"experiments/from_llm.py: expected part=text, or from=BUNDLE with part=extend or scratch; found {arg!r}"
        )
    config = defaults()
    config.name = f"from_llm_{part}"
    small = dict(d_model=64, n_layers=3, n_heads=2, n_kv_heads=2, d_mlp=192)
    config.model = model("2m", tie_embeddings=False, rope_theta=1e3, **small)
    if bundle is not None:
        begin_with(config, bundle)

    config.data.max_tokens = 128
    config.training.batch_size = 4
    config.training.sequence_length = 256
    config.training.learning_rate = 2e-3
    config.training.optimizer = "muon"
    config.training.warmup_steps = 40
    config.training.b2 = 0.99
    config.training.weight_decay = 0.01
    config.training.steps = 400
    config.training.log_every = 20
    config.training.validate_every = 50
    config.training.checkpoint_every = 200
    config.sampling.max_length = 128
    config.evaluation.limit = 200
    if part == "text":
        config.data.train, config.data.validation = texts("train", 1.0), texts("validation", 1.0)
        config.image_tokenizer.steps = 0
        return config

    for split, key in (("train", "train"), ("validation", "validation")):
        config.data[key] = (*pictures(split, 1 - REHEARSED), *texts(split, REHEARSED))
    config.data.image_size = (64, 64)
    config.data.layout = "grid"
    images = config.image_tokenizer  # 4 x 4 codes per image, as in experiments/shapes.py
    images.factor, images.patch, images.width, images.l1_weight = 16, 4, 32, 0.5
    images.multipliers, images.blocks, images.levels = (1, 2, 4), (0, 1, 2), (8, 6, 5)
    images.steps, images.batch_size, images.learning_rate = 2000, 16, 4e-3
    if args["images"]:
        images.model = args["images"]
        describe(images, ())
    config.loss.prompt = 0.1
    config.training.code_embedding_init = "codebook"
    config.training.flip_pairs = 0.35
    config.sampling.image.temperature = 0.25
    config.evaluation.protocol = "shapes"
    if part == "scratch":
        config.init = ""
        config.text_tokenizer.model = text_file(str(bundle))
    else:  # at first only the rows of the new ids are trained
        config.training.only = ("embedding[new]", "head[new]")
        config.training.phases = (ConfigDict(dict(begin=0.1, only=())),)
    return config


def text_file(bundle: str) -> str:
    """The text tokenizer of a bundle, for a model that does not start from the bundle's weights."""
    from ar_unified.bundle import TEXT, Bundle

    return str(Bundle(bundle).folder / TEXT / Bundle(bundle).text_tokenizer.file)
