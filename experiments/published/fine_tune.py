"""Fine-tune a published model, imported as a bundle, on your folder, with its authors' published recipe.

    ar-unified import --from DOWNLOAD --as emu3 --output emu3
    ar-unified run --config experiments/published/fine_tune.py:init=emu3,path=DIR --workdir workdirs/mine

DIR is a folder or a file as in experiments/folder.py; for a text-only language model, it may also have text files. The
bundle decides tokenizers, vocabulary and layout, the model's shape and the sampling settings. The recipe decides which
weights are trained, the learning rate, the loss and the number of rows per step; each of its keys can be changed. A
batch is divided into microbatches of 8 rows.

Arguments, with defaults in brackets: init=BUNDLE; path=DIR; recipe=NAME, one of RECIPES (the recipe of the bundle's
system); steps=N (1000); batch=ROWS (the recipe's, else 8); links=yes|no, whether to follow links that lead out of DIR
(no).

docs/published_weights.md, "Recipes", has the sources, and lists what nobody has published.
"""

from typing import Any

from ml_collections import ConfigDict

from ar_unified.bundle import Bundle
from ar_unified.data.sources import kind_of
from ar_unified.errors import nearest
from ar_unified.experiment.config import begin_with, defaults, parse_arg, whole

ROWS = 8  # rows of a microbatch
# Keys of a config by section. PLAIN is used where a system's authors say nothing.
PLAIN: dict[str, dict[str, Any]] = {
    "training": dict(learning_rate=1e-5, final_fraction=0.0, weight_decay=0.1, clip_norm=1.0),
}
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "plain": PLAIN,
    "chameleon": {
        "training": PLAIN["training"] | dict(batch_size=128),
        "model": dict(dropout=0.05),
        "loss": dict(prompt=0.0),
    },
    # Teaches Chameleon's weights to draw: only the head's rows for image codes are trained, from new random values.
    "anole": {
        "training": dict(
            only=("head[image]",),
            fresh=("head[image]",),
            learning_rate=1e-3,
            schedule="wsd",
            decay="linear",
            decay_fraction=1.0,
            final_fraction=0.0,
            warmup_steps=0,
            weight_decay=0.0,
            clip_norm=1.0,
            b2=0.999,
            condition_dropout=0.0,
        ),
    },
    # For Lumina-mGPT 1 and 2.0; the rate of dropped prompts is from 2.0.
    "lumina_mgpt": {
        "training": dict(
            learning_rate=2e-5, final_fraction=1.0, weight_decay=0.1, clip_norm=4.0, condition_dropout=0.1
        ),
        "model": dict(dropout=0.05),
        "loss": dict(z_loss=1e-5, prompt=0.0),
    },
    "emu3": {
        "training": dict(
            learning_rate=1e-5,
            final_fraction=0.1,
            warmup_steps=30,
            weight_decay=0.1,
            clip_norm=5.0,
            b2=0.95,
            eps=1e-6,
            condition_dropout=0.05,
        ),
        "loss.roles": dict(text=0.0, control=0.0, size=0.0),  # only the loss of image codes
    },
    "liquid": {"training": PLAIN["training"] | dict(learning_rate=2e-5)},
    "lwm": PLAIN | {"loss": dict(mean="by_side")},  # half the mean loss of text plus half the mean loss of images
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The config. arg: the arguments above. Raises ValueError, which names a wrong argument."""
    args = parse_arg(arg, init=None, path=None, recipe="", steps="1000", batch="", links="no")
    if not args["init"] or not args["path"]:
        raise ValueError(
            "experiments/published/fine_tune.py needs a bundle and a folder: fine_tune.py:init=BUNDLE,path=DIR"
        )
    if args["links"] not in ("yes", "no"):
        raise ValueError(f"experiments/published/fine_tune.py: expected links=yes or links=no, found {args['links']!r}")
    config = defaults()
    config.name = "fine_tune"

    begin_with(config, args["init"])
    links = args["links"] == "yes"
    kind = kind_of(args["path"], links)
    if kind == "text" and Bundle(config.init).has_images:
        kind = "folder"  # when it is opened, the message says what is missing

    def source(split: str) -> tuple[ConfigDict, ...]:
        return (ConfigDict(dict(kind=kind, path=args["path"], links=links, split=split)),)

    config.data.train = source("[:95%]")
    config.data.validation = source("[95%:]")
    steps = whole("steps", args["steps"])
    config.training.update(steps=steps, batch_size=ROWS, warmup_steps=10, flip_pairs=0.0)
    for section, keys in recipe_of(args["recipe"], config).items():
        part: Any = config
        for name in section.split("."):
            part = part[name]
        part.update(keys)
    if args["batch"]:
        config.training.batch_size = whole("batch", args["batch"])
    rows = config.training.batch_size
    config.training.accumulation = rows // ROWS if rows % ROWS == 0 else 1
    config.training.warmup_steps = min(config.training.warmup_steps, steps // 10)
    config.model.update(scan_layers=True, remat="full")
    return config


def recipe_of(name: str | None, config: ConfigDict) -> dict[str, dict[str, Any]]:
    """The recipe with that name, or else the recipe of the bundle's system."""
    if name and name not in RECIPES:
        raise ValueError(f"config argument recipe: expected {', '.join(RECIPES)}; found {name}{nearest(name, RECIPES)}")
    return RECIPES.get(name or (Bundle(config.init).published or {}).get("system", ""), PLAIN)
