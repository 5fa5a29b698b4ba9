"""Decides how much of each source is read to train a text tokenizer: a part, all of it, or all of it several times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ar_unified.data.counter_rng import key, uniform
from ar_unified.data.items import BadItem, Source, texts_of
from ar_unified.errors import UserError

_LOOKED_AT = 256  # items of a source that are read to estimate the size of its text


def passes(sources: Sequence[Source], *, temperature: float = 1.0, max_bytes: float = float("inf")) -> list[float]:
    """How often to read each source: 1 is once, 0.1 is an evenly spread tenth of it, and 2.5 is two and a half times.

    A source of b bytes gets a share in proportion to b^(1/temperature). With a temperature of 1, every source is read
    once. With a higher temperature, small sources are read several times. (For languages, multilingual BERT used a
    temperature of 1.4; XLM-R, arXiv:1911.02116, and mT5, arXiv:2010.11934, used 3.3.) The largest source is read once.
    If the total would be more than max_bytes, all sources are read less often.

    Raises:
        UserError: if the temperature is below 1.
    """
    if not temperature >= 1:
        raise UserError(f"config.text_tokenizer.temperature: expected at least 1, found {temperature}")
    sizes = [text_bytes(source) for source in sources]
    largest = max(sizes, default=0.0)
    # A source in which no text was found is read anyway, so that the reader reports the reason.
    often = [(size / largest) ** (1 / temperature - 1) if size else 1.0 for size in sizes]
    total = sum(size * times for size, times in zip(sizes, often, strict=True))
    return [times * min(1.0, max_bytes / total) for times in often] if total else often


def text_bytes(source: Source) -> float:
    """Estimates how many bytes of UTF-8 text a source has, from 256 of its items."""
    looked = found = 0
    part = indices(len(source), min(1.0, _LOOKED_AT / max(len(source), 1)), source.name)
    for _, texts in texts_of(source, part):
        looked += 1
        if not isinstance(texts, BadItem):
            found += sum(len(text.encode(errors="replace")) for text in texts)
    return found / looked * len(source) if looked else 0.0


def indices(items: int, times: float, name: str) -> Iterator[int]:
    """Yields the indices to read, in order: int(times) passes over all items, and then a part of the items for the rest
    of `times`. The part is evenly spread.

    For a tenth, for example, one random item is read from every ten successive items. `name` is the seed. So the part
    covers the whole source and contains no item twice, and no list of indices is kept in memory.
    """
    whole, count = int(times), round((times - int(times)) * items)
    for _ in range(whole):
        yield from range(items)
    stream = key("places", name)
    for start in range(0, count, 4096):
        numbers = np.arange(start, min(start + 4096, count), dtype=np.int64)
        low, high = numbers * items // count, (numbers + 1) * items // count
        yield from (low + (uniform(stream, numbers) * (high - low)).astype(np.int64)).tolist()
