"""Fine-tune a published model, imported as a bundle, on your folder, with the recipe that its authors published.

    ar-unified import --from DOWNLOAD --as emu3 --output emu3
    ar-unified run --config experiments/published/fine_tune.py:init=emu3,path=DIR --workdir workdirs/mine

The folder is as experiments/folder.py reads it. Tokenizers, language, the model's shape and what requests are drawn
with are the bundle's; of the recipe there are the learning rate, its schedule, decay, clipping, the weights of the loss
and how often a prompt is dropped. Batch size and steps are yours: the published ones are of large data and machines.

Arguments: init=BUNDLE; path=DIR; steps=N (1000); links=yes|no, whether links that lead out of DIR are followed (no).

Sources: Lumina-mGPT (lumina_mgpt/exps), Emu3 (scripts/t2i_sft.sh, emu3/train), Chameleon (arXiv 2405.09818, its
supervised fine-tuning). Where nobody published one, Chameleon's stands.
"""

from typing import Any

from ml_collections import ConfigDict

from ar_unified.bundle import Bundle
from ar_unified.experiment.config import begin_with, defaults, parse_arg, whole

_CHAMELEON: dict[str, Any] = {
    "training": dict(learning_rate=1e-5, final_fraction=0.0, weight_decay=0.1, clip_norm=1.0),
    "model": dict(dropout=0.05),
}
RECIPES: dict[str, dict[str, Any]] = {
    "chameleon": _CHAMELEON,
    "lumina_mgpt": {
        "training": dict(
            learning_rate=2e-5, final_fraction=1.0, weight_decay=0.1, clip_norm=4.0, condition_dropout=0.1
        ),
        "model": dict(dropout=0.05),
        "loss": dict(z_loss=1e-5),
    },
    "emu3": {
        "training": dict(
            learning_rate=1e-5,
            final_fraction=0.1,
            warmup_steps=30,
            weight_decay=0.1,
            clip_norm=5.0,
            b2=0.95,
            condition_dropout=0.05,
        ),
        "roles": dict(text=0.0, control=0.0, size=0.0),  # the loss of image codes alone
    },
}


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, init=None, path=None, steps="1000", links="no")
    if not args["init"] or not args["path"]:
        raise ValueError(
            "experiments/published/fine_tune.py needs a bundle and a folder: fine_tune.py:init=BUNDLE,path=DIR"
        )
    if args["links"] not in ("yes", "no"):
        raise ValueError(f"experiments/published/fine_tune.py: expected links=yes or links=no, found {args['links']!r}")
    config = defaults()
    config.name = "fine_tune"

    def source(split: str) -> tuple[ConfigDict, ...]:
        return (ConfigDict(dict(kind="folder", path=args["path"], links=args["links"] == "yes", split=split)),)

    config.data.train = source("[:95%]")
    config.data.validation = source("[95%:]")
    begin_with(config, args["init"])
    steps = whole("steps", args["steps"])
    config.training.update(steps=steps, batch_size=8, warmup_steps=min(10, steps // 10), flip_pairs=0.0)
    published = Bundle(config.init).published or {}
    recipe = RECIPES.get(published.get("system", ""), _CHAMELEON)
    config.training.update(recipe["training"])
    config.model.update(recipe.get("model", {}))
    config.loss.update(recipe.get("loss", {}))
    config.loss.roles.update(recipe.get("roles", {}))
    config.model.update(scan_layers=True, remat="full")
    return config
