"""Apply a trained model: continue a text, translate sentences, or classify an image."""

from rich.console import Console
from rich.table import Table

from parallel.runtime import Runtime
from trainer.config.train import GenerateConfig
from trainer.inference.trained_run import load_trained_run
from trainer.metrics.console import print_whole
from trainer.tasks.registry import task_of


def print_generation(config: GenerateConfig, runtime: Runtime) -> None:
    """Print the output of a run's newest checkpoint for config.prompt, on rank 0."""
    run = load_trained_run(config, runtime)
    output = task_of(run.config.data).generate(config, run)
    if runtime.rank == 0:
        if isinstance(output, Table):
            print_whole(output)
            return
        Console().print(output, markup=False, highlight=False, soft_wrap=True)
