"""How full rows of 4,096 tokens are, and what packing costs: ours compared with Grain's first fit and best fit.

    pip install grain          # in an environment of its own; without it, only ours is measured
    python experiments/benchmarks/packing.py --data DIR [--folder DIR] [--documents N] [--open N ...]

DIR has based-cooking, clothing, noto-emoji, easy-vqa (folders of images and JSONL) and text/udhr. They are prepared
as for a training, but only lengths matter: an image of 64 x 64 pixels has 16 x 16 codes, and each byte of text is a
token. Images are never cut; a document that is longer than a row is cut between its parts or in its text. The last line
is a simulated mixture of captions, texts and interleaved documents, so large that the ends of sources do not matter.

All packers get the same whole documents, at most --documents of a source, drawn at random. Ours plans blocks of 65,536
documents, and every row has documents of one source; the weights of the mixture are shares of rows. Grain gets the
documents in random order, mixed with weights that give the same shares of tokens, and --open is its number of open
rows. Columns: the share of positions with a token, over one epoch of a source or --documents of the mixture; and CPU
microseconds per document, from documents in memory to rows with positions and segments (ours also makes targets, roles
and four more fields).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from loader_scale import Bytes, lengths

from ar_unified.data.loader import pack
from ar_unified.data.packing import Packing
from ar_unified.data.prepare import prepare
from ar_unified.data.shards import Shards
from ar_unified.data.sources import open_source
from ar_unified.language.encoded import TRAINED, Encoded
from ar_unified.language.grammar import Grammar
from ar_unified.language.syntax import fixed_grid
from ar_unified.language.vocabulary import Vocabulary

LENGTH, BATCH = 4096, 64
WEIGHTS = {"based-cooking": 0.2, "clothing": 0.2, "noto-emoji": 0.1, "easy-vqa": 0.3, "udhr": 0.2}
METHODS: dict[str, Any] = {}
try:
    import grain
    from grain.experimental import BestFitPackIterDataset, FirstFitPackIterDataset

    METHODS |= {"first fit": FirstFitPackIterDataset, "best fit": BestFitPackIterDataset}
except ImportError:
    pass


class Greys:
    """An image tokenizer in which a code is the mean of a 4 x 4 patch."""

    codebook_size, factor, codes_per_position, hash = 256, 4, 1, "greys"

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """One code for each 4 x 4 pixels; only their number matters."""
        B, H, W, _ = pixels.shape
        return pixels.reshape(B, H // 4, 4, W // 4, 4, 3).mean((2, 4, 5)).astype(np.int32)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Raises NotImplementedError."""
        raise NotImplementedError("nothing is drawn here")


def prepared(data: Path, folder: Path) -> dict[str, np.ndarray]:
    """Lengths of the documents of every source."""
    grammar = Grammar(Vocabulary(256, 256, text_hash="bytes", image_hash="greys"), fixed_grid(16, 16), Bytes())
    places = {name: data / name for name in WEIGHTS if name != "udhr"}
    sources = [open_source(dict(kind="folder", path=path, label=name)) for name, path in places.items()]
    sources.append(open_source(dict(kind="text", path=data / "text" / "udhr", label="udhr")))
    report = prepare(sources, grammar, Greys(), folder, max_tokens=LENGTH)
    return {name: Shards(folder / name, counts.shards).index["length"] for name, counts in report.sources.items()}


def ours(found: np.ndarray) -> tuple[float, float]:
    """The fill and the microseconds per document of our packing, for one epoch."""
    tokens, marks = np.zeros(LENGTH, np.int32), np.full(LENGTH, TRAINED, np.uint8)
    began = time.process_time()
    packing = Packing(found, LENGTH, seed=0)
    filled = 0
    for start in range(0, packing.rows, BATCH):
        rows = packing.documents(0, np.arange(start, min(start + BATCH, packing.rows)))
        documents = [Encoded(tokens[:n], marks[:n]) for row in rows for n in found[row].tolist()]
        where = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        batch = pack(documents, np.zeros(len(where), np.int8), where, shape=(len(rows), LENGTH), pad=0)
        filled += int(np.count_nonzero(batch.segment_ids))
    spent = time.process_time() - began
    return filled / (packing.rows * LENGTH), spent / len(found) * 1e6


def theirs(dataset: Any, documents: int, method: str, rows: int) -> tuple[float, float]:
    """The same for Grain's packing of `documents` elements of a stream of lengths."""
    tokens = np.ones(LENGTH, np.int32)
    stream = dataset[:documents].map(lambda n: {"tokens": tokens[: int(n)]}).to_iter_dataset()
    packed = METHODS[method](stream, length_struct={"tokens": LENGTH}, num_packing_bins=rows)
    began = time.process_time()
    filled = count = 0
    for row in packed:
        filled, count = filled + int(np.count_nonzero(row["tokens_segment_ids"])), count + 1
    return filled / (count * LENGTH), (time.process_time() - began) / documents * 1e6


def shuffled(found: np.ndarray) -> Any:
    """Lengths in random order, as Grain shuffles."""
    return grain.MapDataset.source(found.tolist()).seed(0).shuffle()


def each_weight(sources: Mapping[str, np.ndarray]) -> np.ndarray:
    """Each source's share of all documents, if WEIGHTS are the sources' shares of all tokens."""
    each = np.array([WEIGHTS[name] / found.mean() for name, found in sources.items()])
    return each / each.sum()


def mixed(sources: Mapping[str, np.ndarray]) -> Any:
    """Lengths of all sources, mixed by weight without end."""
    streams = [shuffled(found).repeat() for found in sources.values()]
    return grain.MapDataset.mix(streams, each_weight(sources).tolist())


def line(name: str, documents: int, found: Mapping[str, tuple[float, float]]) -> None:
    """Prints a line of the table."""
    cells = "  ".join(f"{fill:7.2%} {spent:6.1f}" for fill, spent in found.values())
    print(f"{name:14s} {documents:8d}  {cells}", flush=True)


def main() -> None:
    """Prints for each source how full rows are and what packing costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="where to keep prepared data, and reuse it (default: not kept)")
    parser.add_argument("--documents", type=int, default=60_000)
    parser.add_argument("--open", type=int, nargs="+", default=[64, 1024], help="rows that Grain fills at a time")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        draw = np.random.default_rng(0)
        sources = {
            name: draw.permutation(found)[: arguments.documents]
            for name, found in prepared(arguments.data, arguments.folder or Path(folder) / "data").items()
        }
        contenders = [(method, rows) for method in METHODS for rows in arguments.open]
        columns = ", ".join(["ours", *(f"{m} {n}" for m, n in contenders)])
        print(f"source, documents; fill and microseconds per document: {columns}")
        fills: dict[str, tuple[float, float]] = {}
        for name, found in sources.items():
            fills[name] = ours(found)
            rivals = {f"{m}{n}": theirs(shuffled(found), len(found), m, n) for m, n in contenders}
            line(name, len(found), {"ours": fills[name], **rivals})
        weight = np.array([WEIGHTS[name] for name in sources])
        spent = each_weight(sources) @ np.array([fills[name][1] for name in sources])
        mine = (float(weight @ np.array([fills[name][0] for name in sources])), float(spent))
        rivals = {f"{m}{n}": theirs(mixed(sources), arguments.documents, m, n) for m, n in contenders}
        line("mixture", arguments.documents, {"ours": mine, **rivals})
        simulated = lengths(arguments.documents, 0)
        rivals = {f"{m}{n}": theirs(shuffled(simulated), len(simulated), m, n) for m, n in contenders}
        line("simulated", len(simulated), {"ours": ours(simulated), **rivals})


if __name__ == "__main__":
    main()
