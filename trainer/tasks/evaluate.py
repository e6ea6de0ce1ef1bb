"""Evaluation: the loss per target on a split, and the metric of the task."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace

import sacrebleu
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from parallel.parallel_model import ParallelModel
from parallel.runtime import Runtime
from parallel.strategy import data_degree
from trainer.checkpoint.identity import absolute
from trainer.config.train import EvaluateConfig
from trainer.data import Dataset, open_split, prepare
from trainer.data.loader import Batch, evaluation_batches
from trainer.data.record import changes, data_of, read_record
from trainer.data.tokenizer import Tokenizer
from trainer.inference.trained_run import open_run, transformer
from trainer.loss import count_valid, cross_entropy_sum
from trainer.metrics.console import print_whole
from trainer.run.run_dir import load_config
from trainer.tasks.generate import translate

log = logging.getLogger(__name__)

LARGEST_EXPONENT = 700.0  # exp of more is no float64


def evaluate(
    worker: ParallelModel,
    dataset: Dataset,
    *,
    micro_batch_size: int,
    samples: int = 0,
    tokenizer: Tokenizer | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
    between: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Values of `samples` samples (0 = all), the same ones each time, on every rank the same.

    `eval_loss`: nats per valid target, without label smoothing. Text: `bits_per_character` (or
    `bits_per_token`, where the tokenizer loses characters) and `perplexity` per token. Images:
    `accuracy` (0 to 1). Pairs: `perplexity`, and `bleu` (0 to 100) of translations by `beams` beams
    where a `tokenizer` is given. Where logits are NaN, so is each value: their largest is none.
    `micro_batch_size`: per rank. `between` is called after each micro-batch, on all ranks alike.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=worker.device)
    translations: dict[int, str] = {}
    place, pinned = (worker.data_rank, worker.data_degree), worker.device.type == "cuda"
    batches = evaluation_batches(dataset, micro_batch_size, *place, samples, pin_memory=pinned)
    with worker.evaluating():
        for batch in batches:
            inputs = worker.to_device(batch)
            totals += _totals(worker.forward(inputs), inputs["targets"])
            if tokenizer is not None:
                translations |= _translations(worker, inputs, tokenizer, beams, length_penalty)
            if between is not None:
                between()
    nats, targets, right = worker.sum_over_data(totals).tolist()
    loss = nats / targets
    values = _values(transformer(worker).config.family, loss, right / targets, dataset)
    if tokenizer is not None:
        bleu = _bleu(worker, dataset, translations)
        values["bleu"] = math.nan if math.isnan(loss) else bleu
    return values


def _values(family: str, loss: float, accuracy: float, dataset: Dataset) -> dict[str, float]:
    """Return the loss, in nats, under the names and units of a family's task."""
    values = {"eval_loss": loss}
    if family == "encoder":
        return values | {"accuracy": math.nan if math.isnan(loss) else accuracy}
    if family == "decoder":
        values |= bits(loss, dataset)
    return values | {"perplexity": math.inf if loss > LARGEST_EXPONENT else math.exp(loss)}


def bits(loss: float, dataset: Dataset) -> dict[str, float]:
    """Bits per character; per token where the tokenizer loses characters, which cost nothing."""
    bits = loss / math.log(2)
    if dataset.lost:
        return {"bits_per_token": bits}
    # All that is known of a part of a split is its tokens: they are as long as the others.
    return {"bits_per_character": bits * dataset.targets / dataset.characters}


def _totals(logits: Tensor, targets: Tensor) -> Tensor:
    """(3,) float64: nats, valid targets and those that the model ranks first."""
    nats = cross_entropy_sum(logits, targets)
    right = (logits.argmax(dim=-1) == targets).sum()
    return torch.stack((nats.double(), count_valid(targets).double(), right.double()))


def _translations(
    worker: ParallelModel, inputs: Batch, tokenizer: Tokenizer, beams: int, length_penalty: float
) -> dict[int, str]:
    """Return what the model makes of each source of the micro-batch, by the sample's index."""
    sentences = translate(
        worker,
        inputs["source"],
        inputs.get("source_valid"),
        max_tokens=transformer(worker).config.max_positions,
        bos_id=tokenizer.eot_id,
        eos_id=tokenizer.eot_id,
        beams=beams,
        length_penalty=length_penalty,
    )
    pairs = zip(inputs["index"].tolist(), sentences, strict=True)
    return {index: tokenizer.decode(ids) for index, ids in pairs if index >= 0}


def _bleu(worker: ParallelModel, dataset: Dataset, translations: dict[int, str]) -> float:
    """BLEU over all ranks, as sacreBLEU (arXiv 1804.08771) defines it."""
    found: dict[int, str] = {}
    for part in worker.gather_over_data(translations):
        found |= part
    references = [dataset.reference(index) for index in found]
    return float(sacrebleu.corpus_bleu(list(found.values()), [references]).score)


def bleu_signature() -> str:
    """Return what makes BLEU comparable: the tokenisation and so on that sacreBLEU measures it
    with.
    """
    return str(sacrebleu.BLEU(references=[["."]]).get_signature())


def evaluate_run(config: EvaluateConfig, runtime: Runtime) -> None:
    """Evaluate the newest checkpoint of a run on config.split; a table on the console of rank 0.

    The data are read with the tokenizer, or the classes and pixel statistics, of the run; it says
    where they are not those of training. Raises ConfigError where they do not fit.
    """
    trained = load_config(config.run_dir)
    reads = data_of(trained, config.run_dir)
    reads = replace(reads, path=absolute(config.data.path) or reads.path)
    facts, before = prepare(reads), read_record(config.run_dir)
    if runtime.rank == 0 and before and (what := changes(before, facts, config.split)):
        log.warning("%s", what)
    run = open_run(config, runtime)
    translates = reads.kind == "pairs"
    share = trained.batch_size // data_degree(trained.strategy)
    values = evaluate(
        run.worker,
        open_split(reads, config.split),
        micro_batch_size=config.micro_batch_size or trained.micro_batch_size or share,
        samples=config.samples,
        tokenizer=run.tokenizer() if translates else None,
        beams=config.beams,
    )
    if runtime.rank == 0:
        console = Console()
        console.print(f"{config.run_dir}, {config.split} split:", soft_wrap=True, markup=False)
        print_whole(table(values))
        if translates:
            console.print(f"BLEU: {bleu_signature()}", soft_wrap=True, highlight=False)


def table(values: dict[str, float]) -> Table:
    """One row of values under their names."""
    shown = Table()
    for name in values:
        shown.add_column(name, justify="right")
    shown.add_row(*(f"{value:.4f}" for value in values.values()))
    return shown
