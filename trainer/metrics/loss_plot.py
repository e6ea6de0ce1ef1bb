"""metrics.jsonl read back: the last values of a run, and the curves of several in one picture."""

from importlib import import_module
from pathlib import Path
from typing import Any

from trainer.metrics.jsonl import NAME, is_number, read_lines

TRAINING = ("step", "loss", "tokens_per_second")


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a run's metrics.jsonl; none if there is no such file."""
    try:
        return read_lines(run_dir / NAME)[0]
    except OSError:
        return []


def last_values(run_dir: Path) -> dict[str, float]:
    """Return the last step, loss and tokens_per_second, and each SPLIT_METRIC of the evaluations.

    What was not finite the last time is not there: an earlier value would pass for it.
    """
    found: dict[str, Any] = {}
    for record in records(run_dir):
        if "split" in record:
            plain = {key.removeprefix("eval_"): value for key, value in record.items()}
            found |= {f"{record['split']}_{k}": v for k, v in plain.items() if k != "step"}
        elif "loss" in record:
            found |= {key: record.get(key) for key in TRAINING}
    return {key: value for key, value in found.items() if is_number(value)}


def _style(number: int) -> dict[str, Any]:
    """Return how the curve of a run looks: ten colours, then other kinds of lines."""
    return {
        "markersize": 3,
        "linewidth": 1.2,
        "color": f"C{number % 10}",
        "linestyle": ("-", "--", ":", "-.")[number // 10 % 4],
    }


def draw(runs: dict[str, Path], path: Path) -> bool:
    """Draw a picture of the losses over steps, of training and on the valid split.

    False if none is.

    `runs` are folders by the name shown. Raises OSError where the picture cannot be written.
    """
    lines = {name: records(folder) for name, folder in runs.items()}
    training = {n: [r for r in found if r.get("loss") is not None] for n, found in lines.items()}
    valid = {n: [r for r in found if r.get("split") == "valid"] for n, found in lines.items()}
    training = {name: found for name, found in training.items() if found}
    if not training:
        return False
    pyplot = import_module("matplotlib.pyplot")  # 0.5 s that no other door needs
    pyplot.switch_backend("agg")
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for axis, title, curves, key, marker in (
        (axes[0], "training loss", training, "loss", ""),
        (axes[1], "loss on the valid split", valid, "eval_loss", "o"),
    ):
        for number, name in enumerate(training):
            found = [r for r in curves[name] if r.get(key) is not None]
            steps, values = [r["step"] for r in found], [r[key] for r in found]
            axis.plot(steps, values, label=name, marker=marker, **_style(number))
        axis.set(title=title, xlabel="step", ylabel="nats per target")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    if len(training) <= 40:
        figure.legend(
            *axes[0].get_legend_handles_labels(),
            loc="outside lower center",
            fontsize="small",
            ncols=2 if len(training) > 3 else 1,
        )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
