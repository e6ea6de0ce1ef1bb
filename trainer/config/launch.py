"""The keys of how ranks are started: `launch.*`."""

from dataclasses import dataclass

from parallel.config_fields import key


@dataclass
class LaunchConfig:
    """How ranks are started; read by launch/cli/entrypoint.py."""

    ranks: int = key(
        0,
        "Processes to start on this host when torchrun did not",
        off=0,
        off_means="one",
        at_least=0,
    )
