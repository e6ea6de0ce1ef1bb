"""Rows of an embedding or a classifier that are carried over from another run."""

from dataclasses import dataclass
from pathlib import Path

from trainer.config.model import BOX_SIDES
from trainer.data.dataset import DataFacts
from trainer.data.record import TOKENIZER, read_record
from trainer.data.tokenizer import Tokenizer

# Parameters with a row for each token or class.
BY_ROW = ("embed.tokens.weight", "head.output.weight", "head.output.bias")


@dataclass(frozen=True)
class RowMapping:
    """For each local token or class, its row in the other run; -1 if it has none."""

    what: str  # tokens | classes
    theirs: list[int]

    @property
    def known_rows(self) -> int:
        """Return the number of rows that are carried over."""
        return sum(row >= 0 for row in self.theirs)


def map_vocabulary(there: str, facts: DataFacts, tokenizer: Tokenizer | None) -> RowMapping | None:
    """Map the tokens or classes of this run to rows of the run in folder `there`.

    None if they are the same in the same order, or if that run does not record them.
    """
    if tokenizer is not None:
        path = Path(there) / TOKENIZER
        if not path.is_file() or tokenizer.is_same_file(path):
            return None
        theirs, ours = Tokenizer.load(path).token_ids(), tokenizer.token_ids()
        return RowMapping("tokens", _match_tokens(ours, theirs, tokenizer.vocab_size))
    record = read_record(there)
    if record is None or record.class_names == facts.class_names:
        return None
    theirs, ours = (
        {name: row for row, name in enumerate(names)}
        for names in (record.class_names, facts.class_names)
    )
    rows = _match_tokens(ours, theirs, len(ours))
    if facts.kind == "detection":  # behind the classes are the sides of a box
        rows += range(len(theirs), len(theirs) + BOX_SIDES)
    return RowMapping("classes", rows)


def _match_tokens(ours: dict[str, int], theirs: dict[str, int], size: int) -> list[int]:
    rows = [-1] * size
    for name, row in ours.items():
        rows[row] = theirs.get(name, -1)
    return rows
