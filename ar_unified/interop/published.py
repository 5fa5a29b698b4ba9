"""An opened published model: everything except the values of its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ar_tokenizers.image.tokenizer import ImageTokenizer

from ar_unified.errors import UserError
from ar_unified.interop.keys import Dialect, Keys
from ar_unified.interop.sources import Source
from ar_unified.language.border import Border
from ar_unified.language.grammar import Grammar
from ar_unified.manifests import Json
from ar_unified.model.config import TransformerConfig

_SHOWN = 5  # maximum number of names in a message
_FLOATS = ("BF16", "F32", "F16")


@dataclass(frozen=True)
class Published:
    """A published model, as a system's module makes it from the user's files.

    Attributes:
        system: its name in `interop.SYSTEMS`.
        keys: the transformer's tensors, all of which `source` has.
        text: the text tokenizer as the bundle keeps it.
        image: the image tokenizer; None for a model of text alone.
        data, sampling, loss: sections of the bundle's config.json.
        record: JSON values that an export needs in addition to the bundle's other files.
        notes: messages for the user, one sentence each.
    """

    system: str
    keys: Keys
    source: Source
    grammar: Grammar
    text: Any
    image: ImageTokenizer | None
    data: Mapping[str, Any]
    sampling: Mapping[str, Any]
    record: Mapping[str, Any]
    loss: Mapping[str, Json] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def check_tensors(
    source: Source,
    where: str,
    dialects: Sequence[Dialect],
    config: TransformerConfig,
    border: Border,
    tables: tuple[int, ...] = (),
    aside: Sequence[str] = (),
) -> Keys:
    """The transformer's tensors, in the first of `dialects` that matches the file.

    Args:
        where: the file, for messages.
        aside: prefixes of names of tensors that are not the transformer's, such as "vqmodel.".

    Raises UserError, which names the tensors that are missing, left over or of another shape.
    """
    names = source.names()
    dialect = next((each for each in dialects if each.names["norm"] in names), None)
    if dialect is None:
        expected = " or ".join(dict.fromkeys(str(each.names["norm"]) for each in dialects))
        raise UserError(f"{where}: expected a tensor {expected}, found {_listed(sorted(names))}")
    keys = Keys(dialect, config, border, tables, _groups(source, where, dialect, config))
    wanted = {name: shape for slot in keys.slots() for name, shape in zip(slot.names, slot.shapes, strict=True)}
    tied = dialect.names["head"] if config.tie_embeddings else None
    if tied in names:
        _require_tied(source, where, str(tied), str(dialect.names["embedding"]))
    left = sorted(
        name
        for name in names - wanted.keys()
        if not name.startswith(tuple(aside)) and not name.endswith(dialect.ignored) and name != tied
    )
    if missing := sorted(wanted.keys() - names):
        more = f"; found but not expected: {_listed(left)}" if left else ""
        raise UserError(f"{where}: missing {_listed(missing)}{more}")
    if left:
        raise UserError(
            f"{where}: this model has no place for {_listed(left)}: does --as name the right system, and does the "
            "config belong to these files?"
        )
    for name, shape in wanted.items():
        if (found := source.shape(name)) != shape:
            raise UserError(f"{where}: {name}: expected shape {list(shape)}, as the config says; found {list(found)}")
        if (kind := source.dtype(name)) not in _FLOATS:
            raise UserError(f"{where}: {name}: expected numbers of type {', '.join(_FLOATS)}; found {kind}")
    return keys


def _require_tied(source: Source, where: str, head: str, embedding: str) -> None:
    """Checks that a tied head equals the embedding, if the file has both."""
    if embedding in source.names() and source.read(head).tobytes() != source.read(embedding).tobytes():
        raise UserError(
            f"{where}: {head}: expected the same numbers as in {embedding}, because tie_word_embeddings is true; "
            "found different numbers"
        )


def _groups(source: Source, where: str, dialect: Dialect, config: TransformerConfig) -> tuple[int, int]:
    """The number of vectors of QK-norm weights in the file, for queries and for keys; 0 means one vector, without an
    axis for groups.
    """
    found = []
    for side, heads in (("query", config.n_heads), ("key", config.n_kv_heads)):
        name = str(dialect.names.get(f"layers.attention.{side}_norm.scale", "")).format(0)
        shape = source.shape(name) if config.qk_norm != "none" and name in source.names() else (0,)
        groups = shape[0] if len(shape) == 2 else 0
        if groups and heads % groups:
            raise UserError(f"{where}: {name}: expected a number of vectors that divides {heads} heads, found {groups}")
        found.append(groups)
    return found[0], found[1]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) or "nothing"
    return f"{len(names)} tensors, {shown}, ..." if len(names) > _SHOWN else shown
