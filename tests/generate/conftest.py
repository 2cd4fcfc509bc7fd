"""Makes the models of the tests of the engine and of its scheduler once, with the programs that they have compiled."""

import pytest
from generate.engines import ENDS, LLAMA, alone, generator_of, made, numbered
from models.hybrid import MIXED, make

from ftjax.generate.session import Generator


@pytest.fixture(scope="session")
def uniform(tmp_path_factory) -> Generator:
    """Return a model whose layers all have keys and values."""
    return made(tmp_path_factory.mktemp("model"), LLAMA)


@pytest.fixture(scope="session")
def mixed() -> Generator:
    """Return a model with layers of several sizes, sharing layers, and states."""
    return generator_of(*make(MIXED))


@pytest.fixture(scope="session", params=["uniform", "mixed"])
def generator(request) -> Generator:
    """Return each of both, for what depends on what layers remember."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def want(generator) -> list[list[int]]:
    """Return the answers of the numbered requests."""
    found = [alone(generator, numbered(number)) for number in range(10)]
    assert len({len(one) for one in found}) > 4 and any(one[-1] in ENDS for one in found)
    return found
