"""Training in phases. Each phase has a first step, a mixture of documents, probabilities of flips and dropped prompts,
a length of rows and a batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ar_unified.data.packing import Mixture, Packing
from ar_unified.errors import UserError


@dataclass(frozen=True)
class Phase:
    """How documents are mixed and read from one training step until the next phase begins.

    Attributes:
        from_step: the first step of the phase.
        weights: maps a source to its share of the rows; sources that are not named are left out. None means in
            proportion to their rows in an epoch, so that the epochs of all sources end together.
        flip_pairs: probability that a pair of one text and one image is read in the other direction.
        condition_dropout: probability that a text-to-image document loses its prompt (`grammar.drop_prompt`), and that
            an interleaved document loses everything before one of its images (`grammar.drop_context`). The document
            then begins with an empty prompt, which is the unconditional context of classifier-free guidance. The gap in
            the row becomes padding.
        sequence_length, batch_size: tokens of a row, and rows of a batch; None means the loader's. If rows are shorter
            than the longest rows of any phase, documents that are longer than a row are left out.

    Raises UserError for a probability outside [0, 1], or a size below 1.
    """

    from_step: int = 0
    weights: Mapping[str, float] | None = None
    flip_pairs: float = 0.5
    condition_dropout: float = 0.1
    sequence_length: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("flip_pairs", "condition_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: expected a probability, found {getattr(self, name)}")
        for name in ("sequence_length", "batch_size"):
            size = getattr(self, name)
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise UserError(f"{name}: expected a whole number, at least 1; found {size!r}")


def require_order(phases: Sequence[Phase]) -> None:
    """Raises UserError unless the first phase begins at step 0 and each other phase begins after the phase before
    it."""
    steps = [phase.from_step for phase in phases]
    if not steps or steps[0] != 0 or steps != sorted(set(steps)):
        raise UserError(
            "phases: expected the first phase to begin at step 0, and each other phase to begin after the one before "
            f"it; found the steps {steps}"
        )


def mixtures(
    phases: Sequence[Phase],
    names: Sequence[str],
    packings: Mapping[int, Sequence[Packing]],
    weights: Sequence[Sequence[float]],
) -> list[Mixture]:
    """The stream of rows of each phase. In each phase, every source continues where it was when the last phase ended.

    Args:
        phases: each with its batch_size and sequence_length.
        names: the names of the sources.
        packings: maps a length of rows to the packing of each source. The longest rows have room for every document.
        weights: the weight of each source in each phase; used only if the phase has weights.

    Raises UserError if a phase names a source, and none of the source's documents fits into the rows of the phase.
    """
    found: list[Mixture] = []
    current = list(packings[max(packings)])  # `taken` counts the rows of these packings
    taken = [0] * len(current)
    for i, phase in enumerate(phases):
        if i:
            before = phases[i - 1]
            taken = found[-1].taken((before.batch_size or 0) * (phase.from_step - before.from_step))
        here = packings[phase.sequence_length or 0]
        shares = [float(packing.rows) for packing in here] if phase.weights is None else list(weights[i])
        for at, (name, packing, share) in enumerate(zip(names, here, shares, strict=True)):
            if packing.rows:
                taken[at] = taken[at] if packing is current[at] else packing.after(current[at], taken[at])
                current[at] = packing
            elif share:
                raise UserError(
                    f"source {name!r}: no document fits into the rows of {phase.sequence_length} tokens of the phase "
                    f"that begins at step {phase.from_step}: leave the source out of this phase's weights, or make the "
                    "rows of this phase longer"
                )
        found.append(Mixture([packing.rows for packing in current], shares, taken))
    return found
