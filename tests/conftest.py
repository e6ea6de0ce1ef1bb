"""One pool of CPU ranks for the whole session."""

import signal

import pytest

from parallel.rank_pool import RankPool
from parallel.runtime import JobQueue, process_group

# A shell ignores Ctrl-C for what it starts in the background, and so would the runs started here.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The longest files first, so that none is left alone at the end; every second waits more than it
# computes, and has one beside it that does not.
FIRST = (
    *("test_slurm", "test_equivalence", "test_hosts", "test_traffic"),
    *("test_processes", "test_loop", "test_sweep", "test_resume"),
)


# The files that take longer than about 7 s; the others are `pytest -m fast`, a minute in all.
SLOW = frozenset(
    "test_" + name
    for name in [
        "docs",
        "compress_report",
        "restore",
        "submit",
        "saver",
        "fuzz_files",
        "structured",
        "tracker",
        "tensor",
        "checkpoint",
        "pool",
        "pipeline",
        "signals",
        "watch",
        "context",
        "teach",
        "distill",
        "replicas",
        "evaluate",
        "reduce",
        "generate",
        "chat",
        "export",
        "kills",
        "trace",
        "memory",
        "conf",
        "optim8bit",
        "registry",
        "apply",
        "environment",
        "sweep",
        "resume",
        "guard",
        "traffic",
        "gpu_checks",
        "fuzz_environment",
        "processes",
        "door",
        "loop",
        "hosts",
        "equivalence",
        "nccl_like",
        "presets",
        "slurm",
    ]
)


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(FIRST)}
    for item in items:
        if item.path.stem not in SLOW:
            item.add_marker(pytest.mark.fast)
    items.sort(key=lambda item: place.get(item.path.stem, len(FIRST)))


@pytest.fixture(scope="session")
def ranks():
    pool = RankPool(8)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def runtime():
    """A group of one rank in this process."""
    with process_group("cpu", JobQueue.single_process()) as runtime:
        yield runtime
