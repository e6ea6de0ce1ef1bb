"""Stand-ins for packages that are imported on the way to a training step and not used in it.

`trainer.loop` imports the reader of config.yaml, the metrics of translation, speech and detection,
and the readers of sound and of texts in old encodings. A GPU machine without these packages can
take a step all the same: a name imported from a stand-in is a class that raises when it is called.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

# Not hydra: only conf/ and launch/ import it.
UNUSED = {
    "omegaconf": ("omegaconf._utils", "omegaconf.errors"),
    "soundfile": (),
    "jiwer": (),
    "faster_coco_eval": (),
    "sacrebleu": (),
    "charset_normalizer": (),
}


class StandIn(ModuleType):
    """A module whose names are classes that cannot be called."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type[Exception]:
        if name.startswith("__"):
            raise AttributeError(name)
        module = self.__name__

        def refuse(*_args: Any, **_options: Any) -> None:
            raise RuntimeError(f"{module}.{name} is used, but {module} is not installed here")

        # An exception, since `except` names some of them.
        return type(name, (Exception,), {"__init__": refuse, "__module__": module})


def replace_missing() -> list[str]:
    """Put stand-ins in the place of packages that are not here; return the names of these."""
    missing = []
    for name, parts in UNUSED.items():
        try:
            import_module(name)
        except ImportError:
            missing.append(name)
            sys.modules.update({part: StandIn(part) for part in (name, *parts)})
    return missing
