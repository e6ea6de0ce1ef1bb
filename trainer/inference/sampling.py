"""Sampling: tokens that a language model writes after a prompt."""

# L tokens written so far, S tokens read at once, V vocabulary.

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.errors import NumericalError
from parallel.parallel_model import ParallelModel
from trainer.inference.trained_run import transformer
from trainer.model import DecodingCache


def sample_tokens(
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
            token = _agree_on_token(
                worker, sample_token(logits_V, temperature, top_k, top_p, generator)
            )
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


def sample_token(
    logits_V: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """One token at random, on the CPU: a generator there gives the same numbers everywhere.

    Raises NumericalError where the model has no opinion that is a number.
    """
    check_finite(logits_V)
    if temperature == 0.0:
        return int(logits_V.argmax())
    logits_V = logits_V.double().cpu()
    logits_V = filter_logits((logits_V - logits_V.max()) / temperature, top_k, top_p)
    return int(torch.multinomial(logits_V.softmax(-1), 1, generator=generator))


def filter_logits(logits_V: Tensor, top_k: int, top_p: float) -> Tensor:
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


def _agree_on_token(worker: ParallelModel, token: int) -> int:
    """Return the first data rank's token: rounding on another must not lead that rank elsewhere."""
    own = torch.tensor(token if worker.data_rank == 0 else 0, device=worker.device)
    return int(worker.sum_over_data(own))
