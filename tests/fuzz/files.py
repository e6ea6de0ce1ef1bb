"""Fuzz what reads data: `python tests/fuzz/files.py cases=5500 seed=0`, or `only=KIND:NUMBER`.

Every input is made from a seed and a number, read in this process, and judged by one function
(judge.py): refused with a message, read as the clean input, or read otherwise with a word.
"""

import os
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("RAYON_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["RUST_BACKTRACE"] = "0"

import odd_archives
import odd_boxes
import odd_pairs
import odd_pictures
import odd_texts
import odd_tokenizers
from drafts import Case
from judge import EQUAL, FAULTS, REFUSED, SAID, Verdict, judge

KINDS: dict[str, tuple[Callable[[int, int], Case], int]] = {  # the maker, and its share of cases
    "pictures": (odd_pictures.case, 3),
    "archives": (odd_archives.case, 3),
    "texts": (odd_texts.case, 3),
    "pairs": (odd_pairs.case, 3),
    "tokenizers": (odd_tokenizers.case, 3),
    "boxes": (odd_boxes.case, 3),
}
COLUMNS = (REFUSED, EQUAL, SAID, *FAULTS)


@dataclass
class Outcome:
    """What came of many cases."""

    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    digests: dict[str, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    faults: list[tuple[Case, Verdict]] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    seconds: float = 0.0

    def add(self, case: Case, verdict: Verdict) -> None:
        """Count one case."""
        self.counts[case.kind][verdict.result] += 1
        self.digests[case.kind].add(case.draft.digest())
        self.slowest = max(self.slowest, (verdict.seconds, case.name))
        if verdict.result in FAULTS:
            self.faults.append((case, verdict))

    def table(self) -> str:
        """Return a row for each kind of input, and their sums."""
        rows = [["kind", "inputs", *COLUMNS]]
        for kind, counts in self.counts.items():
            numbers = [len(self.digests[kind]), *(counts[name] for name in COLUMNS)]
            rows.append([kind, *(f"{n:,}" for n in numbers)])
        total = sum(self.counts.values(), Counter())
        inputs = sum(map(len, self.digests.values()))
        rows.append(["all", *(f"{n:,}" for n in (inputs, *(total[c] for c in COLUMNS)))])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(w) if not i else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def run(
    cases: int,
    seed: int,
    folder: Path,
    tell: Callable[[int], None] = lambda done: None,
    kinds: str = "",
    every: int = 1,
) -> Outcome:
    """Judge every n-th of so many cases of all kinds, in the proportion of their shares."""
    outcome, started = Outcome(), time.monotonic()
    chosen = {name: KINDS[name] for name in (kinds.split(",") if kinds else KINDS)}
    total = sum(share for _, share in chosen.values())
    done = 0
    for make, share in chosen.values():
        for number in range(0, -(-cases * share // total), every):
            case = make(number, seed)
            outcome.add(case, judge(case, folder / "case"))
            done += 1
            tell(done)
    outcome.seconds = time.monotonic() - started
    return outcome


def main() -> int:
    """Run what the command line asks for, and print a table and each fault."""
    keys = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    cases, seed = int(keys.get("cases", 5500)), int(keys.get("seed", 0))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        if only := keys.get("only"):
            kind, _, number = only.partition(":")
            case = KINDS[kind][0](int(number), seed)
            verdict = judge(case, folder := Path(keys.get("folder", name)))
            say(f"{case.name}: {verdict.result} ({verdict.seconds:.2f} s) in {folder}")
            say(verdict.detail)
            return verdict.result in FAULTS

        def tell(done: int) -> None:
            if done % 100 == 0:
                say(f"\r{done:,} of {cases:,} ", end="", file=sys.stderr)

        outcome = run(cases, seed, Path(name), tell, keys.get("kinds", ""))
    for case, verdict in outcome.faults:
        say(f"\n{verdict.result}: {case.name}\n{verdict.detail}")
    say(f"\n{outcome.table()}\n{outcome.seconds:.0f} s; slowest {outcome.slowest}")
    return bool(outcome.faults)


say = print


if __name__ == "__main__":
    sys.exit(main())
