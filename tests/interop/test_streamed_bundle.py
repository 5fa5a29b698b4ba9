"""A bundle written layer by layer equals a bundle written from a whole tree, and an interrupted one is no bundle."""

from __future__ import annotations

import numpy as np
import pytest

from ar_unified.bundle import Streamed, named
from tests.bundles import parts, write


def pieces():
    """The parameters in reverse order, with layers as slices."""
    for name, leaf in reversed(named(parts("none")["params"]).items()):
        if name.startswith("layers."):
            yield from ((name, i, np.asarray(leaf[i])) for i in reversed(range(len(leaf))))
        else:
            yield name, None, np.asarray(leaf)


DTYPES = {name: "float32" for name in named(parts("none")["params"])}


def test_layer_by_layer_is_the_same_bundle(tmp_path):
    whole = write(tmp_path / "whole", "none", shard_bytes=1 << 16)
    streamed = write(tmp_path / "streamed", "none", shard_bytes=1 << 16, params=Streamed(DTYPES, pieces()))
    assert streamed.hash == whole.hash and len(list(streamed.folder.glob("model-*"))) > 1


def test_a_stream_that_breaks_off_leaves_no_folder(tmp_path):
    def breaks():
        for number, piece in enumerate(pieces()):
            if number == 3:
                raise OSError("the disk of the source")
            yield piece

    with pytest.raises(OSError, match="of the source"):
        write(tmp_path / "new", "none", params=Streamed(DTYPES, breaks()))
    with pytest.raises(AssertionError, match="were not written"):
        write(tmp_path / "new", "none", params=Streamed(DTYPES, list(pieces())[:-1]))
    assert not list(tmp_path.iterdir())
    assert write(tmp_path / "new", "none", params=Streamed(DTYPES, pieces())).folder.is_dir()
