"""TextTokenizer compared with plain SentencePiece: the speed of encoding long texts, and the memory of training.

    PYTHONPATH=.:tokenizers python experiments/benchmarks/text_tokenizer.py FILE      # tinyshakespeare.txt below

Encoding: one model encodes the text of FILE, unchanged and with spaces instead of line ends, with
`TextTokenizer.encode` (in blocks) and with SentencePiece (as a whole) in turns; the result is the best CPU time of 5.
Training: the peak memory of a new process minus its memory at the start, for 8 MB of text made of 200,000 words, or of
3,000 Chinese characters without spaces. Models have 8,192 pieces. Both numbers are options.

The results: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from ar_tokenizers.text import TextTokenizer


def main() -> None:
    """Prints the speed of encoding and the memory of training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="UTF-8 text of about 1 MB")
    parser.add_argument("--pieces", type=int, default=8192, help="size of the vocabularies")
    parser.add_argument("--megabytes", type=float, default=8, help="text to train on, to measure the memory")
    arguments = parser.parse_args()
    text = arguments.file.read_text(encoding="utf-8-sig")
    for model_type in ("bpe", "unigram"):
        tokenizer = TextTokenizer.train(text.splitlines(), arguments.pieces, model_type=model_type)
        for name, shown in (("lines", text), ("one line", text.replace("\n", " "))):
            print(f"encode {model_type:8}{name:10}" + encoding(tokenizer, shown), flush=True)
    sizes = (arguments.pieces, arguments.megabytes)
    for model_type in ("bpe", "unigram"):
        for kind in ("words", "characters"):
            context = multiprocessing.get_context("spawn")
            with context.Pool(1) as pool:
                print(f"train  {model_type:8}{kind:10} " + pool.apply(training, (model_type, kind, *sizes)), flush=True)


def encoding(tokenizer: TextTokenizer, text: str) -> str:
    """MB/s of both, their ratio, and whether the ids are the same (if not, which have the better score)."""
    bare: Any = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    seconds: dict[str, float] = {"blocks": 1e9, "whole": 1e9}
    ids: dict[str, list[int]] = {}
    ways: dict[str, Callable[[str], list[int]]] = {"blocks": tokenizer.encode, "whole": bare.encode}
    for _ in range(5):
        for name, encode in ways.items():
            start = time.process_time()
            ids[name] = encode(text)
            seconds[name] = min(seconds[name], time.process_time() - start)
    size = len(text.encode()) / 1e6
    speed = {name: size / value for name, value in seconds.items()}
    scores = np.array([bare.get_score(i) for i in range(tokenizer.size)])
    better = scores[ids["blocks"]].sum() - scores[ids["whole"]].sum()
    same = "same ids" if ids["blocks"] == ids["whole"] else f"other ids, log-probability {better:+.3f}"
    return f"{speed['blocks']:5.1f} / {speed['whole']:5.1f} MB/s = {speed['blocks'] / speed['whole']:.2f}  {same}"


def training(model_type: Any, kind: str, pieces: int, megabytes: float) -> str:
    """A line with the memory that training a model on such a corpus needs."""
    before = peak()
    TextTokenizer.train(corpus(kind, pieces, megabytes), pieces, model_type=model_type)
    return f"{peak() - before:5.0f} MB = {(peak() - before) / megabytes:.0f} times the text"


def peak() -> float:
    """The peak memory of this process in MB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e6  # type: ignore[index]


def corpus(kind: str, pieces: int, megabytes: float) -> Iterator[str]:
    """Lines of made-up text for so many pieces: of "words" or of "characters"."""
    draw, size = random.Random(0), 0
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 10))) for _ in range(200_000)]
    characters = [chr(0x4E00 + i) for i in range(min(3000, pieces // 2))]
    while size < megabytes * 1e6:
        text = " ".join(draw.choices(words, k=12)) if kind == "words" else "".join(draw.choices(characters, k=40))
        size += len(text.encode())
        yield text


if __name__ == "__main__":
    main()
