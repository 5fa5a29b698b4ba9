"""How the loader's costs grow with the data: start-up, memory, and time for a random batch, for 10^5 to 10^9 documents.

    python experiments/benchmarks/loader_scale.py --folder DIR [--documents 100000 1000000 ...]

DIR gets the files that `prepare` writes for one source, without the tokens: manifest, index, an empty file for every
shard of 8,192 items, and the planned rows. They have 16 bytes per document, 16 GB for 10^9, and are removed at the end.

Documents are simulated: a third captions with an image of 256 codes, a third texts, a third interleaved. The
lengths of captions, texts and interleaved documents are log-normal. From 10^8 documents on, all runs of 4,096 documents
have the lengths of the first run, so one block is planned instead of 15,259. The cost of planning is measured on the
first 10^6 documents (`plan`).

Then files are dropped from the page cache, as after a restart, and a new process for each size opens the loader and
makes batches of random steps. Columns:
    start    seconds to open the loader, without imports; `work`: the same in CPU seconds
    own      MB that only this process has (RssAnon): after the random batches, minus before the start
    mapped   MB of files that it has mapped and touched; all processes of a host share them
    choose   CPU ms to choose the documents of the 1,024 rows of a random step; median and maximum
    next     the same for the step after it, whose blocks are already in memory
    lay      CPU ms to put them into the arrays of a PackedBatch: 1,024 rows of 4,096 tokens
    step     choose + lay of a random step; median and, as `step_most`, maximum
    first    the same for the first batch of the process, which must get its memory from the system
The cost of reading tokens does not depend on their number, and is not in the table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ar_tokenizers.files import whole

from ar_unified.data import shards
from ar_unified.data.loader import PackedBatches
from ar_unified.data.packing import Packing, blocks, fitting
from ar_unified.language.encoded import Encoded
from ar_unified.language.grammar import Grammar
from ar_unified.language.syntax import fixed_grid
from ar_unified.language.vocabulary import Vocabulary
from ar_unified.manifests import Json
from ar_unified.workdir import write_json

ROWS, LENGTH, SHARD = 1024, 4096, 8192
PLANNED = 10**7  # up to this number every run has its own lengths
STEPS = 12


class Bytes:
    """A text tokenizer with one piece per byte."""

    size, hash = 256, "bytes"

    def encode(self, text: str) -> list[int]:
        """An id for each byte."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of bytes."""
        return bytes(ids).decode("utf-8", "replace")


GRAMMAR = Grammar(Vocabulary(256, 1024, text_hash="bytes", image_hash="none"), fixed_grid(16, 16), Bytes())


def lengths(documents: int, seed: int) -> np.ndarray:
    """The numbers of tokens of documents, int32, as in a mixture of captions, texts and interleaved documents."""
    draw = np.random.default_rng(seed)
    kinds = np.stack(
        [
            262 + draw.lognormal(3.2, 0.6, documents),
            draw.lognormal(5.5, 1.0, documents),
            draw.lognormal(6.8, 0.9, documents),
        ]
    )
    return np.take_along_axis(kinds, draw.integers(0, 3, (1, documents)), 0)[0].clip(8, LENGTH).astype(np.int32)


def generate(folder: Path, documents: int) -> None:
    """Writes the files of `prepare` without the tokens."""
    place = folder / "simulated"
    place.mkdir(parents=True)
    count = -(-documents // SHARD)
    for number in range(count):
        shards.shard_path(place, number).touch()
    np.save(place / "starts.npy", np.minimum(np.arange(count + 1) * SHARD, documents))
    chunk = blocks.RUN * 256
    with whole(place / "index.npy") as file:
        facts = {"descr": np.lib.format.dtype_to_descr(shards.INDEX), "fortran_order": False, "shape": (documents,)}
        np.lib.format.write_array_header_1_0(file, facts)
        repeated = simulated_index(np.resize(lengths(blocks.RUN, 0), chunk))
        for start in range(0, documents, chunk):
            size = min(chunk, documents - start)
            file.write((repeated[:size] if documents > PLANNED else simulated_index(lengths(size, start))).tobytes())
    index = np.load(place / "index.npy", mmap_mode="r")["length"]
    if documents <= PLANNED:
        blocks.store(index, LENGTH, place)
    else:
        repeat_plan(index, place)
    report = {"simulated": {"documents": documents, "shards": count}}
    write_json(folder / "manifest.json", {"vocabulary": GRAMMAR.manifest(), "report": report})


def simulated_index(found: np.ndarray) -> np.ndarray:
    """The index that `prepare` would write for documents of these lengths."""
    rows = np.zeros(len(found), shards.INDEX)
    rows["length"] = found
    return rows


def repeat_plan(index: np.ndarray, place: Path) -> None:
    """The plan of data in which all runs have the same lengths: only one block of each size is planned."""
    dealt = blocks.Blocks(len(index))
    known: dict[int, tuple[bytes, tuple[int, int, bool]]] = {}  # by the size of a block
    counts = []
    with whole(place / f"rows-{LENGTH}.npy") as file:
        facts = {"descr": "<u2", "fortran_order": False, "shape": index.shape}
        np.lib.format.write_array_header_1_0(file, facts)
        for block, size in enumerate(np.diff(dealt.starts).tolist()):
            if size not in known:
                found = np.sort(index[dealt.documents(block)])[::-1]
                rows, decreasing = fitting.rows_of(found, LENGTH)
                known[size] = rows.astype("<u2").tobytes(), (int(rows.max()) + 1, int(found.sum()), decreasing)
            file.write(known[size][0])
            counts.append(known[size][1])
    np.save(place / f"rows-{LENGTH}.blocks.npy", np.array(counts, np.int64))


def measure(folder: Path) -> dict[str, Json]:
    """Measures one size, in a new process."""
    drop_from_cache(folder)
    before = own()
    began, worked = time.perf_counter(), time.process_time()
    loader = PackedBatches(folder, GRAMMAR, batch_size=ROWS, sequence_length=LENGTH, seed=1)
    start, work = time.perf_counter() - began, time.process_time() - worked
    spent: dict[str, list[float]] = {"choose": [], "lay": [], "read": []}
    chosen = Packing.documents

    def timed(name: str, function: Callable[..., object]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            began = time.process_time()
            found = function(*arguments)
            spent[name].append(1e3 * (time.process_time() - began))
            return found

        return call

    Packing.documents = timed("choose", chosen)  # type: ignore[method-assign]
    shards.Shards.read = timed("read", simulated)  # type: ignore[method-assign]
    facts = loader.describe()["simulated"]
    whole_batch = timed("lay", loader.batch)
    whole_batch(0)
    first = spent["lay"][0] - spent["read"][0]
    for found in spent.values():
        found.clear()
    steps = np.random.default_rng(0).integers(0, max(1, facts["rows"] // ROWS - 1), STEPS)
    for step in steps.tolist():
        whole_batch(step)
        whole_batch(step + 1)
    choose, lay, read = (np.array(spent[name]) for name in ("choose", "lay", "read"))
    return {
        "rows": facts["rows"],
        "fill": facts["fill"],
        "start": start,
        "work": work,
        "own": own() - before,
        "mapped": mapped(folder),
        "choose": statistics.median(choose[::2]),
        "most": choose.max(),
        "next": statistics.median(choose[1::2]),
        "lay": statistics.median(lay - choose - read),
        "first": first,
        "step": statistics.median((lay - read)[::2]),
        "step_most": (lay - read)[::2].max(),
    }


def simulated(self: shards.Shards, documents: np.ndarray, known: np.ndarray | None = None) -> list[Encoded]:
    """Replaces the reading of tokens: returns zeros of the right lengths."""
    found = self.facts(documents)["length"] if known is None else known
    tokens, marks = np.zeros(LENGTH, np.int32), np.zeros(LENGTH, np.uint8)
    return [Encoded(tokens[:length], marks[:length]) for length in found.tolist()]


def own() -> float:
    """MB of memory that only this process has."""
    facts = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(facts["RssAnon"].split()[0]) / 1e3


def mapped(folder: Path) -> float:
    """MB of pages that this process has mapped and touched, of files below a folder."""
    kilobytes, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("Rss:"):
            kilobytes += int(line.split()[1]) * inside
        elif not line.split()[0].endswith(":"):
            inside = str(folder.resolve()) in line
    return kilobytes / 1e3


def drop_from_cache(folder: Path) -> None:
    """Drops the folder's indexes from the page cache, as after a restart."""
    for path in folder.rglob("*.npy"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def planning(documents: int = 10**6) -> float:
    """CPU microseconds per document."""
    found = lengths(documents, 0)
    began = time.process_time()
    blocks.Plans(found, LENGTH)
    return (time.process_time() - began) / documents * 1e6


def main() -> None:
    """Prints a line for each number of documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--documents", type=int, nargs="+", default=[10**5, 10**6, 10**7, 10**8])
    parser.add_argument("--measure", action="store_true", help="measure the data that --folder already has")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.folder)))
        return
    print(f"plan: {planning():.2f} us a document")
    folder = arguments.folder / "loader_scale"  # removed at the end; the rest of the folder stays
    for documents in arguments.documents:
        try:
            generate(folder, documents)
            command = [sys.executable, __file__, "--folder", str(folder), "--measure"]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(documents, json.dumps({name: round(value, 3) for name, value in found.items()}), flush=True)


if __name__ == "__main__":
    main()
