"""CMU AN4 with `model=ctc-tiny`: word error rate on its test split of unseen speakers.

`python benchmarks/speech_an4.py FOLDER RUN_DIR [key=value …]` reads a folder with `features.npy`
(mel cepstra of all utterances, one behind the other) and `train.tsv`, `valid.tsv`, `test.tsv` with
the columns `id speaker first_frame frames transcript`. It writes a file of features for each
utterance, with the mean of the utterance subtracted, and the TSV files that `data.kind=speech`
reads, into RUN_DIR-data, trains with `launch/train.py` (with the given keys), and prints the last
line of metrics.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from rich.console import Console

ROOT = Path(__file__).parents[1]
KEYS = (
    *("model=ctc-tiny", "data=speech", "data.mels=13", "data.mel_masks=0"),
    *("data.characters=false", "data.vocab_size=320", "model.dropout=0.15"),
    *("batch_size=8", "steps=6000", "optim.lr=2e-3", "optim.betas=[0.9,0.98]"),
    *("optim.weight_decay=0.05", "optim.warmup_steps=200", "optim.min_lr_ratio=0.02"),
    *("eval.every=500", "checkpoint.every=2000", "metrics.every=50"),
)


def convert(folder: Path, to: Path) -> None:
    """Write the utterances of AN4 as files of features, and TSV files that name them."""
    features_FM = np.load(folder / "features.npy", mmap_mode="r")
    for split in ("train", "valid", "test"):
        lines = []
        with (folder / f"{split}.tsv").open(encoding="utf-8") as table:
            for row in csv.DictReader(table, delimiter="\t"):
                first, frames = int(row["first_frame"]), int(row["frames"])
                own_FM = features_FM[first : first + frames].astype(np.float32)
                np.savez(to / f"{row['id']}.npz", features=own_FM - own_FM.mean(axis=0))
                lines.append(f"{row['id']}.npz\t{row['transcript']}\n")
        (to / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Train, and print the metrics of the test split."""
    folder, run_dir, *keys = sys.argv[1:]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    to = Path(f"{run_dir}-data")
    to.mkdir(parents=True, exist_ok=True)
    convert(Path(folder), to)
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *KEYS]
    command += [f"data.path={to}", f"data.cache={to}/cache", f"run_dir={run_dir}", *keys]
    subprocess.run(command, check=True, env=environment)
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines if '"split": "test"' in line][-1]
    Console(width=100).print(last)


if __name__ == "__main__":
    main()
