"""Several datasets mixed by weight, each in its own form: folders of rows and images, tables, tars, texts.

    ar-unified validate --config experiments/mixture.py:path=DIR --workdir workdirs/mixture --first 1000
    ar-unified run --config experiments/mixture.py:path=DIR --workdir workdirs/mixture
    ar-unified run --config experiments/mixture.py:path=DIR,sources=photos@0.7+books@0.3 --workdir workdirs/mine

Sources are folders below DIR, each named with its share of the packed rows after "@". As in experiments/folder.py, the
files of a source decide its kind. The defaults are recipes with photographs (based-cooking), photographs with
captions (clothing), emoji by name (noto-emoji), questions about drawn figures (easy-vqa) and one text in 29 languages
(text/udhr). data/make_photos.py, make_emoji.py and make_easy_vqa.py make the first four from public sources that they
name. In each source, one image in twenty is held out with all its rows; in texts, one file in twenty.

Arguments: path=DIR (datasets); sources=NAME@SHARE+NAME@SHARE+...; side=PIXELS, an image has about side x side pixels
(64).

Expected: the shares of rows are the requested ones (docs/data.md). The 600 steps only check that everything works.
"""

from ml_collections import ConfigDict

from ar_unified.data.sources import kind_of
from ar_unified.experiment.config import defaults, model, parse_arg, whole

SOURCES = "based-cooking@0.2+clothing@0.2+noto-emoji@0.1+easy-vqa@0.3+text/udhr@0.2"


def weights(written: str) -> dict[str, float]:
    """Name of each source -> its share. Raises ValueError."""
    found: dict[str, float] = {}
    for part in written.split("+"):
        name, _, share = part.rpartition("@")
        try:
            found[name] = float(share)
        except ValueError:
            name = ""
        if not name or not found[name] > 0:
            raise ValueError(
                f"experiments/mixture.py: expected sources=NAME@SHARE+NAME@SHARE, as {SOURCES}, found {part!r}"
            )
    return found


def get_config(arg: str | None = None) -> ConfigDict:
    """The config. arg: the arguments above. Raises ValueError, which names a wrong argument."""
    args = parse_arg(arg, path="datasets", sources=SOURCES, side="64")
    side, shares = whole("side", args["side"]), weights(str(args["sources"]))
    config = defaults()
    config.name = "mixture"

    def sources(split: str) -> tuple[ConfigDict, ...]:
        paths = {f"{args['path']}/{name}": share for name, share in shares.items()}
        return tuple(
            ConfigDict(dict(kind=kind_of(path), path=path, split=split, weight=share)) for path, share in paths.items()
        )

    config.data.train = sources("[:95%]")
    config.data.validation = sources("[95%:]")
    config.data.image_size = (side, side)
    config.data.resize = "aspect"
    config.data.layout = "rows"
    config.data.max_tokens = 512

    config.text_tokenizer.vocab_size = 4096  # the 29 languages have 1,900 different characters

    config.image_tokenizer.levels = (8, 8, 8, 5)
    config.image_tokenizer.crop = side // 32 * 32
    config.image_tokenizer.steps = 1500
    config.image_tokenizer.batch_size = 32

    config.model = model("2m", dropout=0.1)
    config.training.sequence_length = 512
    config.training.batch_size = 8
    config.training.steps = 600
    config.sampling.max_length = 768
    config.sampling.batch_size = 16
    config.evaluation.limit = 32
    return config
