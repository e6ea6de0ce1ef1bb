"""Use of a trained model: go on from a text, translate sentences, or classify an image."""

# B sentences, K beams, R = B × K rows, T source tokens, S target tokens, L tokens written so far,
# C candidates, V vocabulary.

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console, RenderableType
from rich.table import Table
from torch import Tensor

from parallel.errors import NumericalError
from parallel.parallel_model import ParallelModel
from parallel.runtime import Runtime
from trainer.config.train import ConfigError, GenerateConfig
from trainer.data import open_split, prepare
from trainer.data.image_files import decoded
from trainer.data.images import standardized
from trainer.data.record import read_record
from trainer.inference.trained_run import TrainedRun, open_run, transformer
from trainer.metrics.console import print_whole
from trainer.model import DecodingCache

TOP_CLASSES = 5  # shown for an image


def sample(
    worker: ParallelModel,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    eot_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[int]:
    """Return the tokens that a decoder writes after the prompt, up to `eot_id`.

    The same on every rank.

    An empty prompt is the start of a document. Of a text longer than the model's positions the end
    is seen. temperature 0.0 takes the likeliest token; top_k 0 and top_p 1.0 are off.
    """
    model, history = transformer(worker), list(prompt_ids) or [eot_id]
    start, generator = len(history), torch.Generator().manual_seed(seed)
    limit = model.config.max_positions or start + max_tokens
    capacity = min(limit, start + max_tokens)
    with worker.evaluating():
        window, cache = history[-limit:], DecodingCache(model, capacity)
        for _ in range(max_tokens):
            tokens_BS = torch.tensor([window], device=worker.device)
            logits_V = worker.forward({"tokens": tokens_BS}, cache)[0, -1]
            token = _first_ranks(worker, draw(logits_V, temperature, top_k, top_p, generator))
            if token == eot_id:
                break
            history.append(token)
            window = [token]
            if cache.length == limit:  # no position is left: read the newer half again
                window = history[-max(1, limit // 2) :]
                cache = DecodingCache(model, capacity)
    return history[start:]


def check_finite(logits: Tensor) -> None:
    """Raise NumericalError where logits (…, V) have no largest one that is a number."""
    if not logits.amax(-1).isfinite().all():
        raise NumericalError(
            "the model's logits are not finite, so nothing can be written with it; use a "
            "checkpoint from before it diverged, or precision=fp32"
        )


def draw(
    logits_V: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """One token at random, on the CPU: a generator there gives the same numbers everywhere.

    Raises NumericalError where the model has no opinion that is a number.
    """
    check_finite(logits_V)
    if temperature == 0.0:
        return int(logits_V.argmax())
    logits_V = logits_V.double().cpu()
    logits_V = keep_likeliest((logits_V - logits_V.max()) / temperature, top_k, top_p)
    return int(torch.multinomial(logits_V.softmax(-1), 1, generator=generator))


def keep_likeliest(logits_V: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf for all but the top_k likeliest tokens (arXiv 1805.04833), 0 = off, and of these for
    all but the fewest whose probability reaches top_p (arXiv 1904.09751), 1.0 = off.
    """
    if 0 < top_k < len(logits_V):
        weakest = logits_V.topk(top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < weakest, -torch.inf)
    if top_p < 1.0:
        order_V = logits_V.argsort(descending=True)
        probability_V = logits_V[order_V].softmax(-1)
        before_V = probability_V.cumsum(-1) - probability_V
        logits_V = logits_V.index_fill(0, order_V[before_V >= top_p], -torch.inf)
    return logits_V


def _first_ranks(worker: ParallelModel, token: int) -> int:
    """Return the first data rank's token: rounding on another must not lead that rank elsewhere."""
    own = torch.tensor(token if worker.data_rank == 0 else 0, device=worker.device)
    return int(worker.sum_over_data(own))


class Beams:
    """A beam search: the K best unfinished translations of each sentence, the best finished one.

    A score is the log-probability divided by length ** length_penalty, where the end counts as a
    token (after arXiv 1609.08144). A translation is finished when its end is among the K best
    candidates; one beam is greedy search.
    """

    def __init__(
        self,
        sentences: int,
        beams: int,
        max_tokens: int,
        length_penalty: float,
        eos_id: int,
        device: torch.device,
    ):
        self._eos_id, self._penalty, self._max_tokens = eos_id, length_penalty, max_tokens
        self._tokens_BKL = torch.zeros(sentences, beams, 0, dtype=torch.int64, device=device)
        # At first all beams are alike: only one of them may go on.
        self._total_BK = torch.full((sentences, beams), -torch.inf, device=device)
        self._total_BK[:, 0] = 0.0
        self._best_BL = torch.full((sentences, max_tokens), eos_id, device=device)
        self._best_score_B = torch.full((sentences,), -torch.inf, device=device)
        self._finished_B = torch.zeros(sentences, dtype=torch.int64, device=device)
        self._done_B = torch.zeros(sentences, dtype=torch.bool, device=device)

    @property
    def done(self) -> bool:
        """Return whether no sentence can get a better translation."""
        return bool(self._done_B.all())

    def last_tokens(self) -> Tensor:
        """(R,1): what the model reads next."""
        return self._tokens_BKL[:, :, -1].reshape(-1, 1)

    def advance(self, logits_RV: Tensor) -> Tensor:
        """Go on by one token; returns (R,): the row that each beam goes on from."""
        B, K = self._total_BK.shape
        V = logits_RV.shape[-1]
        precise = torch.promote_types(logits_RV.dtype, torch.float32)
        step_BKV = logits_RV.to(precise).log_softmax(-1).view(B, K, V)
        # Of 2 K candidates at most K end, so that K beams always go on.
        total_BC, choice_BC = (self._total_BK[:, :, None] + step_BKV).flatten(1).topk(2 * K)
        beam_BC, token_BC = choice_BC // V, choice_BC % V
        ends_BC = token_BC == self._eos_id
        self._finish(total_BC.masked_fill(~ends_BC, -torch.inf)[:, :K], beam_BC)
        self._total_BK, place_BK = total_BC.masked_fill(ends_BC, -torch.inf).topk(K)
        row_BK = beam_BC.gather(1, place_BK) + K * torch.arange(B, device=beam_BC.device)[:, None]
        kept_BKL = self._tokens_BKL.flatten(0, 1)[row_BK]
        token_BK1 = token_BC.gather(1, place_BK)[:, :, None]
        self._tokens_BKL = torch.cat((kept_BKL, token_BK1), dim=2)
        # Totals only fall, and no length divides them by more than the greatest.
        reachable_B = self._total_BK[:, 0] / self._max_tokens**self._penalty
        self._done_B |= (self._finished_B >= K) | (self._best_score_B >= reachable_B)
        return row_BK.flatten()

    def _finish(self, total_BK: Tensor, beam_BC: Tensor) -> None:
        """Take in the candidates that end here; the total of others is -inf."""
        L = self._tokens_BKL.shape[2]
        total_B, place_B = total_BK.max(dim=1)
        score_B = total_B / (L + 1) ** self._penalty
        better_B = (score_B > self._best_score_B) & ~self._done_B
        beam_B = beam_BC.gather(1, place_B[:, None])[:, 0]
        tokens_BL = self._tokens_BKL[torch.arange(len(beam_B), device=beam_B.device), beam_B]
        self._best_BL[better_B, :L] = tokens_BL[better_B]
        self._best_score_B = torch.where(better_B, score_B, self._best_score_B)
        self._finished_B += total_BK.isfinite().sum(dim=1)

    def sentences(self) -> list[list[int]]:
        """Return the best translation of each sentence, without its end.

        Unfinished where none ends.
        """
        ended = self._best_score_B.isfinite().tolist()
        pairs = zip(self._best_BL.tolist(), self._tokens_BKL[:, 0].tolist(), strict=True)
        return [
            best[: best.index(self._eos_id)] if ends else unfinished
            for ends, (best, unfinished) in zip(ended, pairs, strict=True)
        ]


def translate(
    worker: ParallelModel,
    source_BT: Tensor,
    source_valid_BT: Tensor | None = None,
    *,
    max_tokens: int,
    bos_id: int,
    eos_id: int,
    beams: int = 1,
    length_penalty: float = 1.0,
) -> list[list[int]]:
    """Translations of at most `max_tokens` tokens (of which one ends it), by beam search.

    Every data rank calls it, each with sentences of its own, and stops with the last one.
    """
    model, sentences = transformer(worker), len(source_BT)
    max_tokens = min(max_tokens, model.config.max_positions or max_tokens)
    search = Beams(sentences, beams, max_tokens, length_penalty, eos_id, worker.device)
    inputs = {"source": source_BT.to(worker.device)}
    if source_valid_BT is not None:
        inputs["source_valid"] = source_valid_BT.to(worker.device)
    tokens_B1 = torch.full((sentences, 1), bos_id, device=worker.device)
    row_R = torch.arange(sentences, device=worker.device).repeat_interleave(beams)
    with worker.evaluating():
        cache = DecodingCache(model, max_tokens)
        # The encoder reads each sentence once; then there is a row for each beam.
        logits_RV = worker.forward({**inputs, "tokens": tokens_B1}, cache)[row_R, -1]
        inputs = {name: tensor[row_R] for name, tensor in inputs.items()}
        cache.reorder(row_R)
        row_R = search.advance(logits_RV)
        for _ in range(1, max_tokens):
            # A sharded model communicates in its forward: no rank stops before the others.
            if not worker.any_over_data(not search.done):
                break
            if beams > 1:
                cache.reorder(row_R)
            logits_RV = worker.forward({**inputs, "tokens": search.last_tokens()}, cache)[:, -1]
            row_R = search.advance(logits_RV)
    return search.sentences()


def generate(config: GenerateConfig, runtime: Runtime) -> None:
    """Print what a run's newest checkpoint makes of config.prompt, on the console of rank 0."""
    run = open_run(config, runtime)
    answer = ANSWERS[run.config.model.family](config, run)
    if runtime.rank == 0:
        if isinstance(answer, Table):
            print_whole(answer)
            return
        Console().print(answer, markup=False, highlight=False, soft_wrap=True)


def continue_text(config: GenerateConfig, run: TrainedRun) -> str:
    """Return the prompt and what the model writes after it."""
    tokenizer = run.tokenizer()
    prompt_ids = tokenizer.encode(config.prompt)
    written = sample(
        run.worker,
        prompt_ids,
        max_tokens=config.max_tokens,
        eot_id=tokenizer.eot_id,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
    )
    return tokenizer.decode([*prompt_ids, *written])


def translate_lines(config: GenerateConfig, run: TrainedRun) -> str:
    """Return a translation of each line of the prompt."""
    tokenizer = run.tokenizer()
    lines = [line.strip() for line in config.prompt.splitlines() if line.strip()]
    if not lines:
        raise ConfigError("prompt is empty; it must be the sentence to translate, one on a line")
    longest = run.config.data.seq_len  # longer sentences are cut, as in evaluation
    ids = [line_ids[:longest] or [tokenizer.eot_id] for line_ids in tokenizer.encode_batch(lines)]
    source_BT = torch.full((len(ids), max(map(len, ids))), tokenizer.pad_id)
    source_valid_BT = torch.zeros(source_BT.shape, dtype=torch.bool)
    for row, line_ids in enumerate(ids):
        source_BT[row, : len(line_ids)] = torch.tensor(line_ids)
        source_valid_BT[row, : len(line_ids)] = True
    start_B1 = torch.full((len(ids), 1), tokenizer.eot_id)
    inputs = {"source": source_BT, "source_valid": source_valid_BT, "tokens": start_B1}
    with run.worker.evaluating():
        check_finite(run.worker.forward(run.worker.to_device(inputs)))
    translations = translate(
        run.worker,
        source_BT,
        source_valid_BT,
        max_tokens=config.max_tokens,
        bos_id=tokenizer.eot_id,
        eos_id=tokenizer.eot_id,
        beams=config.beams,
        length_penalty=config.length_penalty,
    )
    return "\n".join(map(tokenizer.decode, translations))


def classify(config: GenerateConfig, run: TrainedRun) -> Table:
    """Return the likeliest classes of the image that the prompt names, with their probabilities.

    An image file needs nothing but the run's folder; `test:0` reads the data.
    """
    facts = read_record(run.config.run_dir) or prepare(run.data)
    names = facts.class_names
    named = re.fullmatch(r"(train|valid|test):(\d+)", config.prompt)
    table = Table("class", "probability", title=config.prompt)
    if named:
        prepare(run.data)
        dataset = open_split(run.data, named[1])
        if int(named[2]) >= len(dataset):
            raise ConfigError(
                f"prompt={config.prompt}: the {named[1]} split has {len(dataset)} images; "
                f"the last is {named[1]}:{len(dataset) - 1}"
            )
        sample = dataset.sample(int(named[2]), None)
        pixels_CHW = sample["images"]
        table.caption = f"labelled {names[int(sample['targets'])]}"
    else:
        pixels_CHW = read_image(config.prompt, facts.image_size, facts.channels)
    images_BCHW = torch.from_numpy(standardized(pixels_CHW[None], facts.mean, facts.std))
    with run.worker.evaluating():
        logits_BV = run.worker.forward({"images": images_BCHW.to(run.worker.device)})
    check_finite(logits_BV)
    probability_V = logits_BV[0, : len(names)].float().softmax(-1)
    top = probability_V.topk(min(TOP_CLASSES, len(names)))
    for probability, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        table.add_row(names[index], f"{probability:.1%}")
    return table


def read_image(name: str, size: int, channels: int) -> NDArray[np.uint8]:
    """(C,H,W) of a .npy array (H,W) or (H,W,C) of uint8, or of any image that Pillow reads.

    It is decoded as in training (pictures.py); ConfigError if that is not possible.
    """
    if not name:
        raise ConfigError("prompt is empty; it must be a .png or .npy file, or e.g. test:0")
    if Path(name).suffix == ".npy":
        try:
            pixels = np.asarray(np.load(name, allow_pickle=False))
        except Exception as error:  # numpy raises what it likes on damaged files
            raise ConfigError(
                f"prompt={name} cannot be read as an image ({error}); it must be a .png or .npy "
                "file, or e.g. test:0"
            ) from error
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    else:
        pixels = decoded(Path(name), channels, "prompt")
    if pixels.dtype != np.uint8 or pixels.shape != (size, size, channels):
        raise ConfigError(
            f"prompt={name} is {pixels.dtype} of shape {pixels.shape}; the model reads uint8 of "
            f"shape {(size, size, channels)} (rows, columns, channels)"
        )
    return pixels.transpose(2, 0, 1)


ANSWERS: dict[str, Callable[[GenerateConfig, TrainedRun], RenderableType]] = {
    "decoder": continue_text,
    "encoder": classify,
    "encoder_decoder": translate_lines,
}
