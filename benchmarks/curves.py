"""Loss curves of one job under every strategy, and how far each is from one process.

`python benchmarks/curves.py [steps] [picture]` trains the default job on bundled data in float32,
once per strategy on CPU ranks that it starts itself, and draws docs/curves.png.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RUNS = {
    "single": ["strategy=single"],
    "ddp, 2 ranks": ["strategy=ddp", "launch.ranks=2"],
    "fsdp, 2 ranks": ["strategy=fsdp", "launch.ranks=2"],
    "tensor, 2 ranks": ["strategy=tensor", "launch.ranks=2"],
    "pipeline, 2 ranks": ["strategy=pipeline", "launch.ranks=2"],
    "context, 2 ranks": ["strategy=context", "launch.ranks=2"],
    "hybrid: pipeline 2 × tensor 2": [
        "strategy=hybrid",
        "strategy.pipeline=2",
        "strategy.tensor=2",
        "launch.ranks=4",
    ],
}
# At the default learning rate rounding grows to 0.03 within 100 steps in float32.
JOB = [
    "precision=fp32",
    "optim.lr=1e-3",
    "metrics.every=1",
    "eval.every=0",
    "eval.samples=8",
    "eval.test=false",
    "metrics.sample_tokens=0",
    "device=cpu",
]


def losses(overrides: list[str], steps: int, folder: str) -> list[float]:
    """The training loss of every step of one run."""
    command = [sys.executable, "launch/train.py", *JOB, *overrides, f"steps={steps}"]
    subprocess.run([*command, f"run_dir={folder}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
    return [line["loss"] for line in lines if "loss" in line]


def picture(curves: dict[str, list[float]]) -> Figure:
    """Losses above, distances from the first curve below."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    reference = next(iter(curves.values()))
    steps = range(1, len(reference) + 1)
    for number, (name, curve) in enumerate(curves.items()):
        width = 2 + 1.2 * (len(curves) - number)  # those that are drawn first show at the edges
        above.plot(steps, curve, label=name, linewidth=width)
        if number:
            gaps = [abs(a - b) for a, b in zip(curve, reference, strict=True)]
            below.plot(steps, gaps, label=name, color=f"C{number}", linewidth=1.2)
    above.set_ylabel("training loss, nats per token")
    above.legend()
    below.set_ylabel("distance from single, nats")
    below.set_xlabel("step")
    below.set_yscale("symlog", linthresh=1e-6)
    below.axhline(1e-3, color="0.6", linestyle="--", linewidth=1)
    below.set_ylim(0, 1e-2)
    return figure


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    path = sys.argv[2] if len(sys.argv) > 2 else str(ROOT / "docs" / "curves.png")
    curves: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, overrides in RUNS.items():
            curves[name] = losses(overrides, steps, f"{folder}/{len(curves)}")
            worst = max(abs(a - b) for a, b in zip(curves[name], curves["single"], strict=True))
            sys.stdout.write(f"{name}: last {curves[name][-1]:.4f}, distance ≤ {worst:.1e}\n")
            sys.stdout.flush()
    picture(curves).savefig(path, dpi=110)
