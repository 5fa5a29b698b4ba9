"""SimpleAR: Qwen2.5 with the codes of a Cosmos tokenizer, which follow the last id of SimpleAR's text tokenizer.

A prompt begins with <|t2i|>, an image with <|soi|>; nothing ends an image. Images are square: 1024 pixels, 64 x 64
codes, unless --size says otherwise. The Cosmos tokenizer is for video clips (Cosmos-1.0-Tokenizer-DV8x16x16) and is not
imported, so the model's images are codes alone.

Sources: wdrink/SimpleAR, generate.py (an id is code + len(tokenizer), guidance 6, top-k 64000) and simpar/train
(train.py's special tokens, preprocess.py's prompts).
"""

from __future__ import annotations

from ar_unified.errors import UserError
from ar_unified.interop import hf_config
from ar_unified.interop.files import Files
from ar_unified.interop.hf_config import QWEN2
from ar_unified.interop.ids import language, named
from ar_unified.interop.published import Published
from ar_unified.interop.sources import inside, read_json
from ar_unified.interop.text import without_images
from ar_unified.language.syntax import ImageLayout

_MARKS = {"pad": "<|endoftext|>", "bos": "<|t2i|>", "eos": "<|im_end|>", "boi": "<|soi|>"}
_ADDED = "added_tokens.json"  # the file with SimpleAR's names, if tokenizer.json is Qwen's own
_SIDE = 64
_LENGTH = 6144  # tokens of an image of 64 x 64 codes, and of its prompt
_NOTE = (
    "The model's images are only codes ({codes} different ones): Cosmos-1.0-Tokenizer-DV8x16x16, which turns codes "
    "into pixels, is not imported."
)


def _names(files: Files) -> dict[str, int]:
    """The published id of each token by its name. Raises UserError if two files give a token different ids."""
    names = dict(files.names)
    for folder in (files.folder, files.text_file.parent):
        if not (folder / _ADDED).exists():
            continue
        path = inside(folder, _ADDED)
        added = read_json(path)
        for name in added:
            id = named(added, name, str(path))
            if names.setdefault(name, id) != id:
                raise UserError(f"{path}: {name!r}: expected id {names[name]}, as {files.text_file} has; found {id}")
    return names


def open_simplear(files: Files) -> Published:
    """Opens SimpleAR, a Qwen2 whose images are codes alone. Raises UserError, which names the file, if something does
    not fit."""
    where = str(files.text_file)
    config = hf_config.read(files.config, QWEN2, str(files.folder))
    names = _names(files)
    marks = {control: named(names, name, where) for control, name in _MARKS.items()}
    first = max(names.values()) + 1
    if first >= config.vocab_size:
        raise UserError(
            f"{where}: expected image codes after id {first - 1}, the last named token; found only "
            f"{config.vocab_size} ids"
        )
    codes = range(first, config.vocab_size)
    layout = ImageLayout("simplear", *(files.size or (_SIDE, _SIDE)))
    ids = language(config.vocab_size, files.text_ids, marks, layout, codes=codes)
    image = {"temperature": 1.0, "top_k": 64000, "top_p": 1.0}
    note = _NOTE.format(codes=len(codes))
    return without_images(files, "simplear", config, ids, note, guidance=6.0, image=image, max_length=_LENGTH)
