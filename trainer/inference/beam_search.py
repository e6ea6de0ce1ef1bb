"""Beam search with an encoder-decoder."""

# B sources, K beams, R = B × K rows, T source tokens, L tokens generated so far, C candidates,
# V vocabulary.

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.parallel_model import ParallelModel
from trainer.inference.trained_run import unwrap_transformer
from trainer.nn.cache import DecodingCache

# Ids of tokens that a translation may not hold, and more that it may not begin with.
Banned = tuple[Sequence[int], Sequence[int]]


class BeamSearch:
    """State of a beam search: each sentence's K best unfinished and its best finished translation.

    A score is the log-probability divided by length ** length_penalty; the length includes the end
    token (after arXiv 1609.08144). A translation is finished when its end token is among the K best
    candidates. One beam is greedy search.
    """

    def __init__(
        self,
        sentences: int,
        beams: int,
        max_tokens: int,
        length_penalty: float,
        end_ids: Sequence[int],
        device: torch.device,
        banned: Banned = ((), ()),
    ):
        self._banned = [*banned[0]], [*banned[0], *banned[1]]
        self._ends = torch.tensor(list(dict.fromkeys(end_ids)), device=device)
        self._penalty, self._max_tokens = length_penalty, max_tokens
        self._tokens_BKL = torch.zeros(sentences, beams, 0, dtype=torch.int64, device=device)
        # All beams start identical: only the first one is extended.
        self._total_BK = torch.full((sentences, beams), -torch.inf, device=device)
        self._total_BK[:, 0] = 0.0
        self._best_BL = torch.full((sentences, max_tokens), int(self._ends[0]), device=device)
        self._best_score_B = torch.full((sentences,), -torch.inf, device=device)
        self._finished_B = torch.zeros(sentences, dtype=torch.int64, device=device)
        self._done_B = torch.zeros(sentences, dtype=torch.bool, device=device)

    @property
    def done(self) -> bool:
        """Return whether no sentence's best translation can improve."""
        return bool(self._done_B.all())

    def last_tokens(self) -> Tensor:
        """Return the newest token of each beam, the model's next input, (R,1)."""
        return self._tokens_BKL[:, :, -1].reshape(-1, 1)

    def advance(self, logits_RV: Tensor) -> Tensor:
        """Extend the beams by one token; return the row (R,) that each beam extends."""
        B, K = self._total_BK.shape
        V = logits_RV.shape[-1]
        precise = torch.promote_types(logits_RV.dtype, torch.float32)
        precise_RV = logits_RV.to(precise, copy=True)
        precise_RV[:, self._banned[self._tokens_BKL.shape[2] == 0]] = -torch.inf
        step_BKV = precise_RV.log_softmax(-1).view(B, K, V)
        # Each beam ends in at most one candidate per end token: of the others at least K are left.
        candidates = min((1 + len(self._ends)) * K, K * V)
        total_BC, choice_BC = (self._total_BK[:, :, None] + step_BKV).flatten(1).topk(candidates)
        beam_BC, token_BC = choice_BC // V, choice_BC % V
        ends_BC = torch.isin(token_BC, self._ends)
        self._finish(total_BC.masked_fill(~ends_BC, -torch.inf)[:, :K], beam_BC)
        self._total_BK, choice_BK = total_BC.masked_fill(ends_BC, -torch.inf).topk(K)
        row_BK = beam_BC.gather(1, choice_BK) + K * torch.arange(B, device=beam_BC.device)[:, None]
        prefix_BKL = self._tokens_BKL.flatten(0, 1)[row_BK]
        token_BK1 = token_BC.gather(1, choice_BK)[:, :, None]
        self._tokens_BKL = torch.cat((prefix_BKL, token_BK1), dim=2)
        # Totals only decrease, and the largest length gives the largest divisor.
        reachable_B = self._total_BK[:, 0] / self._max_tokens**self._penalty
        self._done_B |= (self._finished_B >= K) | (self._best_score_B >= reachable_B)
        return row_BK.flatten()

    def _finish(self, total_BK: Tensor, beam_BC: Tensor) -> None:
        """Record the candidates that end at this token; the total of all others is -inf."""
        L = self._tokens_BKL.shape[2]
        total_B, choice_B = total_BK.max(dim=1)
        score_B = total_B / (L + 1) ** self._penalty
        better_B = (score_B > self._best_score_B) & ~self._done_B
        beam_B = beam_BC.gather(1, choice_B[:, None])[:, 0]
        tokens_BL = self._tokens_BKL[torch.arange(len(beam_B), device=beam_B.device), beam_B]
        self._best_BL[better_B, :L] = tokens_BL[better_B]
        self._best_score_B = torch.where(better_B, score_B, self._best_score_B)
        self._finished_B += total_BK.isfinite().sum(dim=1)

    def sentences(self) -> list[list[int]]:
        """Return the best translation of each sentence, without its end token.

        If none has finished, return the best unfinished one.
        """
        ended = self._best_score_B.isfinite().tolist()
        pairs = zip(self._best_BL.tolist(), self._tokens_BKL[:, 0].tolist(), strict=True)
        end_id = int(self._ends[0])  # fills the best ones
        return [
            best[: best.index(end_id)] if ends else unfinished
            for ends, (best, unfinished) in zip(ended, pairs, strict=True)
        ]


def translate_tokens(
    worker: ParallelModel,
    source_BT: Tensor,
    source_valid_BT: Tensor | None = None,
    *,
    max_tokens: int,
    bos_id: int,
    end_ids: Sequence[int],
    prefix_ids: Sequence[int] = (),
    beams: int = 1,
    length_penalty: float = 1.0,
    banned: Banned = ((), ()),
) -> list[list[int]]:
    """Return translations of at most `max_tokens` tokens (end token included), by beam search.

    Any of `end_ids` ends one; each continues `prefix_ids`, and leaves them out. None holds `banned`
    ids. All data ranks must call it: a sharded model communicates, and they stop together.
    """
    model, device = unwrap_transformer(worker), worker.device
    max_tokens = min(max_tokens, (model.config.max_positions or 1 << 60) - len(prefix_ids))
    lengths = max_tokens, length_penalty
    search = BeamSearch(len(source_BT), beams, *lengths, end_ids, device, banned)
    valid = {} if source_valid_BT is None else {"source_valid": source_valid_BT}
    inputs = worker.to_device({"source": source_BT} | valid)
    first_BS = torch.tensor([[bos_id, *prefix_ids]] * len(source_BT), device=device)
    row_R = torch.arange(len(source_BT), device=device).repeat_interleave(beams)
    with worker.evaluation_mode():
        cache = DecodingCache(model, max_tokens + len(prefix_ids))
        logits_RV = worker.forward({**inputs, "tokens": first_BS}, cache)[row_R, -1]
        inputs = {name: tensor[row_R] for name, tensor in inputs.items()}
        cache.reorder_rows(row_R)  # the encoder has run once; now there is a row per beam
        row_R = search.advance(logits_RV)
        for _ in range(1, max_tokens):
            if not worker.any_data_rank(not search.done):
                break
            if beams > 1:
                cache.reorder_rows(row_R)
            logits_RV = worker.forward({**inputs, "tokens": search.last_tokens()}, cache)[:, -1]
            row_R = search.advance(logits_RV)
    return search.sentences()
