"""The keys of evaluation while training: `eval.*`."""

from dataclasses import dataclass

from parallel.config_fields import key


@dataclass
class EvalConfig:
    """Evaluation while training; read by trainer/tasks/evaluate.py."""

    every: int = key(
        250,
        "Interval between evaluations on the valid split",
        unit="steps",
        off=0,
        off_means="only at the end",
        at_least=0,
    )
    samples: int = key(
        0,
        "Samples of the valid split per evaluation: a fixed pseudo-random subset",
        off=0,
        off_means="all",
        at_least=0,
    )
    test: bool = key(True, "Evaluate on the full test split at the end")
    beams: int = key(
        1, "Beam width on the test split: translation for BLEU, speech for WER", at_least=1
    )
