"""Fixtures over tests/sampling/tiny.py."""

import pytest

from tests.sampling.tiny import GRAMMARS, random_params


@pytest.fixture(scope="session")
def params():
    return random_params()


@pytest.fixture(params=["grid", "rows"])
def grammar(request):
    return GRAMMARS[request.param]
