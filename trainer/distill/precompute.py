"""Precompute a trained model's top-k logits for every target of the train split."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from safetensors.numpy import save
from torch import Tensor

from parallel.runtime import Runtime
from parallel.strategy import data_degree
from trainer.atomic_files import new_folder
from trainer.config.loss import IGNORED
from trainer.config.train import TeachConfig, classes_of
from trainer.data import data_fingerprint, open_split, prepare_data
from trainer.data.cache import progress_bar
from trainer.data.loader import evaluation_batches
from trainer.data.record import copy_record, data_of
from trainer.distill.logit_dataset import LogitFacts, write_facts
from trainer.inference.trained_run import load_trained_run
from trainer.run.run_dir import load_config

FILE_BYTES = 1 << 27  # approximate size of a file
LEAST = -65504.0  # lowest finite float16

Answer = tuple[np.ndarray, np.ndarray]  # a sample's logits (N,K) and their classes (N,K)


class LogitWriter:
    """Writes teacher logits into a folder, sample by sample."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: list[tuple[str, int, int]] = []
        self._waiting: list[Answer] = []
        self._written = self._bytes = 0

    def add(self, answer: Answer) -> None:
        """Append the next sample's logits; write a file once it is full."""
        self._waiting.append(answer)
        self._bytes += sum(part.nbytes for part in answer)
        if self._bytes >= FILE_BYTES:
            self.flush()

    def finish_folder(self, facts: LogitFacts, run_dir: str) -> None:
        """Write the metadata, and copy the run's record of its data."""
        write_facts(self._folder, facts)
        copy_record(run_dir, self._folder)

    def flush(self) -> list[tuple[str, int, int]]:
        """Write buffered samples; return all files: name, bytes and index of the first sample."""
        if not self._waiting:
            return self._files
        logits, classes = zip(*self._waiting, strict=True)
        starts = np.cumsum([0, *map(len, logits)], dtype=np.int64)
        file = {"starts": starts, "logits": np.concatenate(logits)}
        file["classes"] = np.concatenate(classes)
        path = self._folder / f"answers-{len(self._files):05d}.safetensors"
        path.write_bytes(save(file))
        self._files.append((path.name, path.stat().st_size, self._written))
        self._written += len(self._waiting)
        self._waiting, self._bytes = [], 0
        return self._files


def top_k_logits(logits: Tensor, targets: Tensor, k: int) -> list[Answer]:
    """Return the top-k logits minus the largest, and their classes, at each valid target.

    One pair per sample; logits (B,S,V) or (B,V). The subtraction does not change the softmax, and
    float16 is most precise near zero.
    """
    values, classes = logits.float().topk(k, dim=-1)
    values = (values - values[..., :1]).clamp(min=LEAST).half()
    smallest = np.uint16 if logits.shape[-1] <= 1 << 16 else np.int32
    size = len(targets)
    valid_BS = (targets != IGNORED).view(size, -1).cpu().numpy()
    values_BSK = values.view(size, -1, k).cpu().numpy()
    classes_BSK = classes.view(values_BSK.shape).cpu().numpy().astype(smallest)
    return [(values_BSK[i][valid], classes_BSK[i][valid]) for i, valid in enumerate(valid_BS)]


def teach_run(config: TeachConfig, runtime: Runtime) -> None:
    """Write config.output_dir from the newest checkpoint of config.run_dir; all ranks compute.

    Raises ConfigError if the folder cannot be written, and leaves no partial folder.
    """
    trained = load_config(config.run_dir)
    reads = data_of(trained, config.run_dir)
    prepare_data(reads)
    worker = load_trained_run(config, runtime).worker
    dataset = open_split(reads, "train")
    local_batch = trained.batch_size // data_degree(trained.strategy)
    size = config.micro_batch_size or trained.micro_batch_size or local_batch
    batches = evaluation_batches(
        dataset,
        size,
        worker.data_rank,
        worker.data_degree,
        pin_memory=worker.device.type == "cuda",
    )
    facts = partial(
        LogitFacts,
        kind=trained.data.kind,
        seq_len=trained.data.seq_len,
        path=trained.data.path,
        data=data_fingerprint(reads, ["train"]),
        classes=classes_of(trained.model),
        k=config.k,
        samples=len(dataset),
    )
    with open_writer(config, runtime.rank == 0, facts) as add, worker.evaluation_mode():
        for batch in batches:
            inputs = worker.to_device(batch)
            logits = top_k_logits(worker.forward(inputs), inputs["targets"], config.k)
            own = [a for a, i in zip(logits, batch["index"].tolist(), strict=True) if i >= 0]
            for answers in worker.gather_data_ranks(own):  # in sample order
                add(answers)


@contextmanager
def open_writer(
    config: TeachConfig, first: bool, facts: Callable[..., LogitFacts]
) -> Iterator[Callable[[list[Answer]], None]]:
    """Yield a function that appends the logits of the next samples to config.output_dir.

    `facts` builds the metadata from the list of files. Raises ConfigError if writing fails.
    """
    if not first:
        yield lambda answers: None
        return
    to = Path(config.output_dir)
    with new_folder(to) as folder:
        writer = LogitWriter(folder)
        with progress_bar("Teacher logits", facts(files=()).samples, show=True) as advance:

            def add_answers(answers: list[Answer]) -> None:
                for answer in answers:
                    writer.add(answer)
                advance(len(answers))

            yield add_answers
        written = facts(files=tuple(writer.flush()))
        writer.finish_folder(written, config.run_dir)
    size = sum(size for _, size, _ in written.files) / 1e6
    Console().print(
        f"teacher logits: {to}, {written.samples} samples, {size:.3g} MB",
        markup=False,
        soft_wrap=True,
    )
