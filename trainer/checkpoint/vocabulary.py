"""Which rows of an embedding, or of a classifier, weights from another run bring along."""

from dataclasses import dataclass
from pathlib import Path

from trainer.data.dataset import DataFacts
from trainer.data.record import TOKENIZER, read_record
from trainer.data.tokenizer import Tokenizer

# Parameters with a row for each token or class.
BY_ROW = ("embed.tokens.weight", "head.output.weight", "head.output.bias")


@dataclass(frozen=True)
class RowMapping:
    """For each token or class here, its row there; -1 where there is none."""

    what: str  # tokens | classes
    theirs: list[int]

    @property
    def known_rows(self) -> int:
        """Return how many rows are brought along."""
        return sum(row >= 0 for row in self.theirs)


def map_vocabulary(there: str, facts: DataFacts, tokenizer: Tokenizer | None) -> RowMapping | None:
    """Return which rows of the run in `there` are those of the tokens or classes here.

    None where all are, in the same order, or where that run does not say what its rows are.
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
    return RowMapping("classes", _match_tokens(ours, theirs, len(ours)))


def _match_tokens(ours: dict[str, int], theirs: dict[str, int], size: int) -> list[int]:
    rows = [-1] * size
    for name, row in ours.items():
        rows[row] = theirs.get(name, -1)
    return rows
