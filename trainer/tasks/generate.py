"""Use of a trained model: continue a text, translate sentences, or classify an image."""

from rich.console import Console
from rich.table import Table

from parallel.runtime import Runtime
from trainer.config.train import GenerateConfig
from trainer.inference.trained_run import open_run
from trainer.metrics.console import print_whole
from trainer.tasks.registry import TASKS


def generate(config: GenerateConfig, runtime: Runtime) -> None:
    """Print what a run's newest checkpoint makes of config.prompt, on the console of rank 0."""
    run = open_run(config, runtime)
    answer = TASKS[run.config.data.kind].generate(config, run)
    if runtime.rank == 0:
        if isinstance(answer, Table):
            print_whole(answer)
            return
        Console().print(answer, markup=False, highlight=False, soft_wrap=True)
