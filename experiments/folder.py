"""Train on your own data: a folder of captions.jsonl, docs.jsonl and/or vqa.jsonl with their images, or tables or tars.

    ar-unified run --config experiments/folder.py:path=PATH --workdir workdirs/mine

Rows: {"image", "text"}; {"segments": [{"type": "text", "text"} | {"type": "image", "image"}, ...]};
{"image", "question", "answer"}; {"messages": [{"role", "content"}, ...]}. `ar-unified validate PATH` checks them first.
PATH may also be a Parquet, Arrow or tar file (WebDataset), a folder of these, or "shards/{000..063}.tar"; docs/data.md
says how columns and members must be named. The last twentieth of the rows of such files is held out. In a folder of
rows, one image in twenty (at least one, if there are two) is held out with all its rows. Images keep their aspect
ratio: a document has an image's size, followed by its codes row by row.

Arguments, with defaults in brackets: path=PATH; side=PIXELS, an image has about side x side pixels (96); links=yes|no,
whether to follow links that lead out of PATH (no); init=BUNDLE, start from that model's weights, tokenizers and image
layout (none).

Expected for 348 recipes with 133 photographs: every sample parses, after 9 minutes on two cores, with 3.3 GB of memory.
The 600 steps only check that everything works; they do not give a good model of cooking.
"""

from ml_collections import ConfigDict

from ar_unified.data.sources import kind_of
from ar_unified.experiment.config import begin_with, defaults, model, parse_arg, whole


def get_config(arg: str | None = None) -> ConfigDict:
    """The config. arg: the arguments above. Raises ValueError, which names a wrong argument."""
    args = parse_arg(arg, path=None, side="96", links="no", init=None)
    if not args["path"]:
        raise ValueError("experiments/folder.py needs the folder: --config experiments/folder.py:path=DIR")
    if args["links"] not in ("yes", "no"):
        raise ValueError(f"experiments/folder.py: expected links=yes or links=no, found {args['links']!r}")
    side, links = whole("side", args["side"]), args["links"] == "yes"
    kind = kind_of(args["path"], links)
    if kind not in ("jsonl", "parquet", "webdataset"):
        kind = "folder"  # when it is opened, the message says what is missing
    config = defaults()
    config.name = "folder"

    def source(split: str) -> tuple[ConfigDict, ...]:
        return (ConfigDict(dict(kind=kind, path=args["path"], links=links, split=split)),)

    config.data.train = source("[:95%]")
    config.data.validation = source("[95%:]")
    config.data.image_size = (side, side)
    config.data.resize = "aspect"
    config.data.layout = "rows"
    config.data.max_tokens = 512

    config.text_tokenizer.vocab_size = 2048

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
    config.sampling.text.temperature = 0.7
    config.evaluation.limit = 32
    if args["init"]:
        begin_with(config, args["init"])
    return config
