"""A multilingual SentencePiece model, and what it makes of each language.

    ar-unified tokenizer --config experiments/text_tokenizer.py:path=DIR --workdir workdirs/text

Every .txt, .md or .jsonl file of DIR, and every folder in it, is one language (or source), named after it.
text_tokenizer/text.model in the workdir is the model, report.json the table below.

Arguments: path=DIR; by=line|file, what one text is (line).
"""

from pathlib import Path

from ml_collections import ConfigDict

from ar_unified.cli.config import defaults, parse_arg
from ar_unified.data.text_files import FILES


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, path=None, by="line")
    if not args["path"]:
        raise ValueError("experiments/text_tokenizer.py needs texts: --config experiments/text_tokenizer.py:path=DIR")
    config = defaults()
    config.name = "text_tokenizer"
    found = [path for path in sorted(Path(args["path"]).iterdir()) if path.is_dir() or any(map(path.match, FILES))]
    config.data.train = tuple(
        ConfigDict(dict(kind="text", path=str(path), by=args["by"], label=path.stem)) for path in found
    )
    config.text_tokenizer.vocab_size = 8192
    config.image_tokenizer.steps = 0
    return config
