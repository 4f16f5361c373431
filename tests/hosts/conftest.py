"""Models that the stream tests share; a module may define its own under the same names."""

import pytest

from tests.hosts.models import MEMORIES, tiny_model


@pytest.fixture(scope="module", params=MEMORIES)
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def lm2():
    return tiny_model("lm2")
