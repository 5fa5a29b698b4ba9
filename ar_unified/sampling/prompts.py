"""Reads prompts before their samples are drawn. It batches them by length, reads each prompt once, and keeps
the last batches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from ar_unified.sampling.steps import Prefix

_SMALLEST = 16  # tokens in the smallest bucket of prompts
_PREFILL = 16  # the most prompts that are read at once
KEPT = 4  # batches of prompts that are kept for later samples

_Prompt = tuple[int, np.ndarray]  # the number of the prompt's adapter, and the prompt's tokens
_Key = tuple[int, bytes]


class Prompts:
    """Reads each prompt once, no matter how many samples begin with it, and keeps the last batches.

    Args:
        prefill: reads a batch, given as tokens [rows, size], lengths [rows], adapter [rows], int32 each.
        rows: the number of rows of a batch.
        pad: the id that fills the places after a prompt.
    """

    def __init__(self, prefill: Callable[[np.ndarray, np.ndarray, np.ndarray], Prefix], rows: int, pad: int):
        self._prefill, self._rows, self._pad = prefill, rows, pad
        self._batches: OrderedDict[int, tuple[Prefix, dict[_Key, int]]] = (
            OrderedDict()
        )  # the most recently used one is last

    def read(self, prompts: Sequence[_Prompt]) -> list[tuple[Prefix, list[int]]]:
        """Returns the batches that contain the prompts. Each batch comes with the row of every prompt, or -1 if that
        prompt is in another batch."""
        wanted = {_key(prompt): prompt for prompt in prompts}
        kept = {id: batch for id, batch in self._batches.items() if wanted.keys() & batch[1].keys()}
        known = {key for _, rows in kept.values() for key in rows}
        missing: dict[int, list[_Prompt]] = {}
        for key, prompt in wanted.items():
            if key not in known:
                missing.setdefault(bucket(len(prompt[1])), []).append(prompt)
        for size, group in missing.items():
            for i in range(0, len(group), self._rows):
                batch = self._read(group[i : i + self._rows], size)
                kept[id(batch[0])] = batch
        for name, batch in kept.items():
            self._batches[name] = batch
            self._batches.move_to_end(name)
        while len(self._batches) > KEPT:
            self._batches.popitem(last=False)
        found, left = [], dict.fromkeys(wanted)
        for prefix, rows in kept.values():
            mine = {key: row for key, row in rows.items() if key in left}
            found.append((prefix, [mine.get(_key(prompt), -1) for prompt in prompts]))
            left = {key: None for key in left if key not in mine}
        return [(prefix, rows) for prefix, rows in found if max(rows) >= 0]

    def _read(self, prompts: Sequence[_Prompt], size: int) -> tuple[Prefix, dict[_Key, int]]:
        tokens = np.full((self._rows, size), self._pad, np.int32)
        lengths, adapter = np.zeros((2, self._rows), np.int32)
        for i, (own, prompt) in enumerate(prompts):
            tokens[i, : len(prompt)], lengths[i], adapter[i] = prompt, len(prompt), own
        return self._prefill(tokens, lengths, adapter), {_key(prompt): i for i, prompt in enumerate(prompts)}


def _key(prompt: _Prompt) -> _Key:
    return prompt[0], prompt[1].tobytes()


def prefill_rows(batch_size: int, ways: int) -> int:
    """How many prompts an engine of `batch_size` reads at once, if its mesh splits rows over `ways` devices."""
    return -(-min(2 * batch_size, _PREFILL) // ways) * ways


def bucket(n: int) -> int:
    """The smallest of 16, 32, 64, ... that is at least n."""
    return max(_SMALLEST, 1 << (n - 1).bit_length()) if n else _SMALLEST
