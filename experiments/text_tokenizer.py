"""Trains a multilingual SentencePiece model, and counts its tokens for each language.

    ar-unified tokenizer --config experiments/text_tokenizer.py:path=DIR --workdir workdirs/text

Every .txt, .md or .jsonl file in DIR, and every folder in it with such files, is one language (or source) with that
name: en.txt is "en", or "en.txt" if there is also an en.md or a folder en. Hidden files and folders, and folders
without text, are skipped. The workdir gets the model in text_tokenizer/text.model and the table in report.json.

Arguments: path=DIR; by=line|file, whether a text is a line or a file (line).

Expected: decoding restores every line; 3 to 8 bytes per token for 30 languages and 8,192 pieces, in 2.3 s
(docs/text_tokenizers.md).
"""

from pathlib import Path

from ml_collections import ConfigDict

from ar_unified.data.files import Folder, hidden
from ar_unified.data.sources.text_files import FILES, languages
from ar_unified.errors import UserError
from ar_unified.experiment.config import defaults, parse_arg


def has_text(path: Path) -> bool:
    """Whether a path is a text file, or a folder with a text file that is not hidden."""
    if not path.is_dir():
        return any(Path(path.name.lower()).match(pattern) for pattern in FILES)
    return bool(Folder(path).search(lambda name: has_text(Path(name))))


def get_config(arg: str | None = None) -> ConfigDict:
    """The config. arg: the arguments above. Raises UserError if there is no text."""
    args = parse_arg(arg, path=None, by="line")
    if not args["path"]:
        raise UserError("experiments/text_tokenizer.py needs texts: --config experiments/text_tokenizer.py:path=DIR")
    config = defaults()
    config.name = "text_tokenizer"
    seen = [path for path in sorted(Path(args["path"]).iterdir()) if not hidden(path.name) and has_text(path)]
    if not seen:
        raise UserError(f"{args['path']}: expected files named {', '.join(FILES)} in it, or in its folders; found none")
    config.data.train = tuple(
        ConfigDict(dict(kind="text", path=str(path), by=args["by"], label=label))
        for path, label in zip(seen, languages(seen), strict=True)
    )
    config.text_tokenizer.vocab_size = 8192
    config.image_tokenizer.steps = 0
    return config
