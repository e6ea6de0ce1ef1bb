"""Whether what is installed will do; asked before anything imports torch."""

import re
from importlib.metadata import PackageNotFoundError, version

OLDEST_TORCH = (2, 11)  # as in pyproject.toml


def torch_problem() -> str:
    """What is wrong with the torch that is installed, in one line; empty = nothing."""
    wanted = "torch>=" + ".".join(map(str, OLDEST_TORCH))
    try:
        found = version("torch")
    except PackageNotFoundError:
        return f'torch is not installed; pip install "{wanted}", or make setup'
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers and tuple(map(int, numbers.groups())) < OLDEST_TORCH:
        return f'torch is {found}, but must be {wanted}; pip install --upgrade "{wanted}"'
    return ""
