"""One pool of CPU ranks for the whole session."""

import signal

import pytest

from parallel.pool import RankPool

# A shell ignores Ctrl-C for what it starts in the background, and so would the runs started here.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def ranks():
    pool = RankPool(8)
    yield pool
    pool.close()
