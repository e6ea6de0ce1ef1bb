"""Generate tokens with a language model by sampling."""

# L tokens generated so far, S tokens per forward, V vocabulary.

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.errors import NumericalError
from parallel.parallel_model import ParallelModel
from trainer.inference.trained_run import unwrap_transformer
from trainer.nn.cache import DecodingCache


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: temperature 0.0 takes the most probable one."""

    temperature: float = 0.0
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1.0 = off
    seed: int = 0


def sample_tokens(
    worker: ParallelModel,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    eot_id: int,
    end_ids: Collection[int] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[int]:
    """Return the tokens that a decoder generates after the prompt, before `eot_id` or any end.

    The result is the same on every rank. An empty prompt is the start of a document. A text longer
    than the model's positions is truncated to its end. temperature 0.0 takes the most probable
    token; top_k 0 and top_p 1.0 are off.
    """
    model, history = unwrap_transformer(worker), list(prompt_ids) or [eot_id]
    start, generator = len(history), torch.Generator().manual_seed(seed)
    sampling = Sampling(temperature, top_k, top_p)
    limit = model.config.max_positions or start + max_tokens
    capacity = min(limit, start + max_tokens)
    with worker.evaluation_mode():
        window, cache = history[-limit:], DecodingCache(model, capacity)
        for _ in range(max_tokens):
            token = next_token(worker, window, cache, sampling, generator)
            if token == eot_id or token in end_ids:
                break
            history.append(token)
            window = [token]
            if cache.length == limit:  # no position is left: restart the cache with the newer half
                window = history[-max(1, limit // 2) :]
                cache = DecodingCache(model, capacity)
    return history[start:]


def next_token(
    worker: ParallelModel,
    window: Sequence[int],
    cache: DecodingCache,
    sampling: Sampling,
    generator: torch.Generator,
) -> int:
    """Return the token that follows on the cached ones and `window`, the same on every rank."""
    tokens_BS = torch.tensor([list(window)], device=worker.device)
    logits_V = worker.forward({"tokens": tokens_BS}, cache)[0, -1]
    token = sample_token(logits_V, sampling.temperature, sampling.top_k, sampling.top_p, generator)
    return _agree_on_token(worker, token)


def check_finite(logits: Tensor) -> None:
    """Raise NumericalError if the maximum over V of any logits (…,V) is not finite."""
    if not logits.amax(-1).isfinite().all():
        raise NumericalError(
            "the model's logits are not finite, so it cannot generate anything; use a "
            "checkpoint from before it diverged, or precision=fp32"
        )


def sample_token(
    logits_V: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """Sample one token, on the CPU, where a generator gives the same numbers on every machine.

    Raises NumericalError if the logits are not finite.
    """
    check_finite(logits_V)
    if temperature == 0.0:
        return int(logits_V.argmax())
    logits_V = logits_V.double().cpu()
    logits_V = filter_logits((logits_V - logits_V.max()) / temperature, top_k, top_p)
    return int(torch.multinomial(logits_V.softmax(-1), 1, generator=generator))


def filter_logits(logits_V: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set the logits outside of top-k, then outside of top-p, to -inf.

    top_k: the most probable tokens (arXiv 1805.04833), 0 = off. top_p: the smallest set of these
    whose probability reaches top_p (arXiv 1904.09751), 1.0 = off.
    """
    if 0 < top_k < len(logits_V):
        threshold = logits_V.topk(top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < threshold, -torch.inf)
    if top_p < 1.0:
        order_V = logits_V.argsort(descending=True)
        probability_V = logits_V[order_V].softmax(-1)
        before_V = probability_V.cumsum(-1) - probability_V
        logits_V = logits_V.index_fill(0, order_V[before_V >= top_p], -torch.inf)
    return logits_V


def _agree_on_token(worker: ParallelModel, token: int) -> int:
    """Return data rank 0's token on every rank, so that rounding does not make them diverge."""
    own = torch.tensor(token if worker.data_rank == 0 else 0, device=worker.device)
    return int(worker.sum_over_data(own))
