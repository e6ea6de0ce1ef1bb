"""CMU AN4 with `model=ctc-tiny`: word error rate on its test split of unseen speakers.

`python benchmarks/speech_an4.py FOLDER RUN_DIR [key=value …]` reads a folder with `features.npy`
(mel cepstra of all utterances, one behind the other) and `train.tsv`, `valid.tsv`, `test.tsv` with
the columns `id speaker first_frame frames transcript`. It writes a file of features for each
utterance, with mean and deviation of its speaker removed, and the TSV files that `data.kind=speech`
reads, into RUN_DIR-data. Training utterances are there five times, as vocal tracts of five lengths
would say them. It trains with `launch/train.py` (with the given keys), and prints the metrics of
the test split, if there are any (eval.test).
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from rich.console import Console

# Of the cepstra, see the corpus' README.
CEPSTRA, FILTERS, BAND = 13, 40, (130.0, 6800.0)
WARPS = (0.88, 0.94, 1.0, 1.06, 1.12)  # of the frequencies of training utterances
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
    cepstra_FK = np.load(folder / "features.npy", mmap_mode="r").astype(np.float64)
    for split in ("train", "valid", "test"):
        with (folder / f"{split}.tsv").open(encoding="utf-8") as table:
            rows = list(csv.DictReader(table, delimiter="\t"))
        of_speaker: dict[str, list[np.ndarray]] = {}
        for row in rows:
            first, frames = int(row["first_frame"]), int(row["frames"])
            of_speaker.setdefault(row["speaker"], []).append(cepstra_FK[first : first + frames])
        said = {name: np.concatenate(parts) for name, parts in of_speaker.items()}
        lines = []
        for row in rows:
            first, frames = int(row["first_frame"]), int(row["frames"])
            own_FK, all_FK = cepstra_FK[first : first + frames], said[row["speaker"]]
            for factor in WARPS if split == "train" else (1.0,):
                name = f"{row['id']}-{factor}.npz"
                warped_FK = (own_FK - all_FK.mean(axis=0)) @ warp_cepstra(factor)
                np.savez(to / name, features=np.float32(warped_FK / all_FK.std(axis=0)))
                lines.append(f"{name}\t{row['transcript']}\n")
        (to / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")


def warp_cepstra(factor: float) -> np.ndarray:
    """Return the matrix (K, K) of cepstra of a vocal tract of another length.

    Each filter reads the smooth spectrum at `factor` times its frequency (Jaitly and Hinton 2013).
    """
    mel_M = np.linspace(*(1127 * np.log1p(np.array(BAND) / 700)), FILTERS)
    warped_M = 1127 * np.log1p(factor * np.expm1(mel_M / 1127))
    orders_K = np.pi * np.arange(CEPSTRA)
    place_M, from_M = (
        (np.clip(m, mel_M[0], mel_M[-1]) - mel_M[0]) / (mel_M[-1] - mel_M[0])
        for m in (mel_M, warped_M)
    )
    basis_MK, read_MK = (
        np.cos((x_M[:, None] * (FILTERS - 1) + 0.5) / FILTERS * orders_K)
        for x_M in (place_M, from_M)
    )
    found_KK: np.ndarray = np.linalg.lstsq(basis_MK, read_MK, rcond=None)[0]
    return found_KK.T


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
    for line in lines:
        if '"split": "test"' in line:
            Console(width=100).print(json.loads(line))


if __name__ == "__main__":
    main()
