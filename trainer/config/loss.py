"""The keys of the loss, `loss.*`, and the target that it leaves out."""

from dataclasses import dataclass

from parallel.config_fields import key

IGNORED = -100  # target excluded from the loss: padding
# CTC: the class of no character, and the target of a vector behind the last character.
BLANK, NO_CHARACTER = 0, -1


@dataclass
class LossConfig:
    """The loss; read by trainer/loss.py."""

    label_smoothing: float = key(
        0.0,
        "Fraction of the target's probability spread over all classes",
        off=0.0,
        at_least=0,
        below=1,
    )
    box_weight: float = key(
        2.0, "Detection: weight of the boxes' overlap beside that of the classes", at_least=0
    )
    chunks: int = key(
        1,
        "Chunks of a micro-batch whose logits are computed and freed one after another: less "
        "memory with a large vocabulary, for one more matrix product",
        off=1,
        at_least=1,
    )
