"""One S3 server for the tests of a process; each test has its own folder in it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stores import BUCKET, Store, using


@pytest.fixture(scope="session")
def store() -> Iterator[Store]:
    found = Store()
    yield found
    found.close()


@pytest.fixture
def url(store: Store, tmp_path: Path) -> Iterator[str]:
    """A folder of the store that no other test uses; meanwhile this process uses that store."""
    quick = {"AR_UNIFIED_CACHE": str(tmp_path / "cache"), "AR_UNIFIED_STORE_PATIENCE": "20"}
    with using(store.variables() | quick):
        yield f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}"
