"""Puts a published id space into our order, `[text | controls | size tokens | image codes | rest]`. The names of its
tokens say what the ids mean.

Axes: `V` ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ar_unified.errors import UserError
from ar_unified.language.border import Border
from ar_unified.language.syntax import ImageLayout
from ar_unified.language.vocabulary import Vocabulary
from ar_unified.manifests import Json

PLAIN = ImageLayout("plain", 1, 1)  # text alone


@dataclass(frozen=True)
class Language:
    """The meaning of a system's ids. Its vocabulary does not have the tokenizers' hashes yet."""

    border: Border
    vocabulary: Vocabulary
    layout: ImageLayout


def language(
    size: int,
    text: Iterable[int],
    controls: Mapping[str, int],
    layout: ImageLayout = PLAIN,
    *,
    codes: range = range(0),
    sizes: Sequence[int] = (),
) -> Language:
    """The language of a published table that has `size` ids.

    Args:
        text: published ids that the text tokenizer uses; an id that also has another meaning does not count as text.
        controls: published id of each control token that the layout needs. Leave out a control that has no token in the
            table; it gets the last free id.
        codes: published ids of the image codes.
        sizes: published ids of the size tokens, in order.

    Raises UserError for an id outside the table, or with two meanings.
    """
    wanted = layout.record.controls
    others = {**{id: f"<{name}>" for name, id in controls.items()}}
    for what, ids in (("size token", sizes), ("image code", codes)):
        for number, id in enumerate(ids):
            if id in others:
                raise UserError(f"ids: {what} {number} and {others[id]} both have id {id} in the published table")
            others[id] = f"{what} {number}"
    pieces = sorted(set(text) - others.keys())
    taken = others.keys() | set(pieces)
    if taken and not 0 <= min(taken) <= max(taken) < size:
        raise UserError(f"ids: expected a table of at least {max(taken) + 1} ids, one for each token; found {size}")
    free = sorted(set(range(size)) - taken)
    missing = [name for name in wanted if name not in controls]
    if len(missing) > len(free):
        raise UserError(f"ids: the table has no token for {', '.join(missing)}, and no free id")
    spare = {name: free.pop() for name in missing}
    ids = [{**controls, **spare}[name] for name in wanted]
    theirs = [*pieces, *ids, *sizes, *codes]
    left = sorted(set(range(size)) - set(theirs))
    vocabulary = Vocabulary(len(pieces), len(codes), len(sizes), controls=wanted, rest=len(left))
    return Language(Border.from_ids([*theirs, *left]), vocabulary, layout)


def named(names: Mapping[str, Json], name: str, where: str) -> int:
    """The id of a token by its name. Raises UserError if there is no such token."""
    found = names.get(name)
    if type(found) is not int or found < 0:
        raise UserError(f"{where}: expected a token {name!r}, found none: is this the tokenizer of these weights?")
    return found


def codes_of(found: Mapping[int, int], where: str) -> range:
    """Published ids of the image codes, in the order of the codes. Raises UserError if there are none, one is missing,
    or the ids are not consecutive.
    """
    if not found or sorted(found) != list(range(len(found))):
        missing = next(code for code in range(len(found) + 1) if code not in found)
        raise UserError(f"{where}: expected a token for each image code, found none for code {missing}")
    return run([found[code] for code in sorted(found)], "image code", where)


def run(ids: Sequence[int], what: str, where: str) -> range:
    """The ids as a range. Raises UserError, which names the first id out of order, if they are not consecutive."""
    for number, id in enumerate(ids):
        if id != ids[0] + number:
            raise UserError(
                f"{where}: {what} {number}: expected id {ids[0] + number}, because ids must be consecutive; found {id}"
            )
    return range(ids[0], ids[0] + len(ids)) if ids else range(0)


def same_codes(ids: Language, codes: int, where: str) -> None:
    """Raises UserError unless `ids` has as many image codes as the image tokenizer, which has `codes`."""
    if (found := ids.vocabulary.codebook_size) != codes:
        raise UserError(f"{where}: expected {codes} image codes, as the image tokenizer has; found {found}")
