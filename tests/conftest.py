"""One pool of CPU ranks for the whole session."""

import pytest

from parallel.pool import RankPool


@pytest.fixture(scope="session")
def ranks():
    pool = RankPool(8)
    yield pool
    pool.close()
