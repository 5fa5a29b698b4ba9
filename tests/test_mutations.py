"""The mistakes of `make mutate` (tests/mutations*.py) can still be made: each changes one line that is there."""

from __future__ import annotations

from tests.mutate import MUTATIONS, impossible


def test_every_mistake_can_be_made():
    assert not [reason for mutation in MUTATIONS if (reason := impossible(mutation))]
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    assert all(mutation.old != mutation.new for mutation in MUTATIONS)
