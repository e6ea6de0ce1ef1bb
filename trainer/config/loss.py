"""The keys of the loss, `loss.*`, and the target that it leaves out."""

from dataclasses import dataclass

from parallel.config_fields import key

IGNORED = -100  # a target that no loss is taken of: padding


@dataclass
class LossConfig:
    """The loss; read by trainer/loss.py."""

    label_smoothing: float = key(
        0.0, "Share of the target spread over all classes", off=0.0, at_least=0, below=1
    )
    chunks: int = key(
        1,
        "Pieces of a micro-batch whose logits are made, used and forgotten one after another: "
        "less memory where the vocabulary is large, for one matrix product more",
        off=1,
        at_least=1,
    )
