import pytest

from tests.inference.serving import make_small


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The model of `serving`."""
    return make_small(tmp_path_factory.mktemp("small"))
