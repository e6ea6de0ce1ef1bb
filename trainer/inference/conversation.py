"""Answers of a chat model, whose cache is kept from turn to turn."""

from collections.abc import Iterator, Sequence

import torch

from parallel.errors import ConfigError
from parallel.parallel_model import ParallelModel
from trainer.data.chat_template import ChatTemplate, Message
from trainer.data.tokenizer import Tokenizer
from trainer.inference.sampling import Sampling, next_token
from trainer.inference.trained_run import unwrap_transformer
from trainer.model import DecodingCache

UNFINISHED = "\ufffd"  # what bytes of an incomplete character decode to
SMALLEST_CAPACITY = 1024  # tokens of a cache, which doubles when it is full


class Dialogue:
    """A conversation with a decoder; all ranks must take the same turns.

    The keys and values of the turns so far stay in a cache, as far as the chat template repeats
    their tokens.
    """

    def __init__(self, worker: ParallelModel, tokenizer: Tokenizer, sampling: Sampling):
        source = tokenizer.files.chat_template()
        if not source:
            raise ConfigError("the run's folder holds no chat template; it is no run of chats")
        self._worker, self._tokenizer, self._sampling = worker, tokenizer, sampling
        self._template = ChatTemplate(tokenizer, source)
        self._model = unwrap_transformer(worker)
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._cache: DecodingCache | None = None
        self._capacity = 0
        self._cached: list[int] = []  # the tokens in the cache
        self.messages: list[Message] = []

    def answer(self, text: str, max_tokens: int) -> Iterator[str]:
        """Yield the answer to the next message in pieces of text, as they are generated."""
        yield from self.answer_to([*self.messages, {"role": "user", "content": text}], max_tokens)

    def answer_to(self, messages: Sequence[Message], max_tokens: int) -> Iterator[str]:
        """Yield the answer to a whole conversation, and make it this one.

        Raises ConfigError if the conversation is longer than the model's positions.
        """
        ids = self._template.encode(messages, add_generation_prompt=True)
        limit = self._model.config.max_positions or len(ids) + max_tokens
        if len(ids) >= limit:
            raise ConfigError(
                f"the conversation has {len(ids)} tokens, and the model model.max_positions="
                f"{limit}; the next message begins a new one"
            )
        max_tokens = min(max_tokens, limit - len(ids))
        generated: list[int] = []
        shown = ""
        with self._worker.evaluation_mode():
            window = self._reuse_cache(ids, max_tokens, limit)
            for _ in range(max_tokens):
                token = self._advance(window)
                if token in self._tokenizer.end_ids:
                    break
                generated.append(token)
                window = [token]
                text = self._tokenizer.decode(generated)
                if not text.endswith(UNFINISHED) and text.startswith(shown):
                    yield text[len(shown) :]
                    shown = text
        # Bytes that turn out to be no character change how those before them are decoded.
        if rest := self._tokenizer.decode(generated)[len(shown) :]:
            yield rest
        self.messages = [*messages, {"role": "assistant", "content": shown + rest}]

    def _reuse_cache(self, ids: list[int], max_tokens: int, limit: int) -> list[int]:
        """Keep what the cache shares with `ids`; return the tokens that are left to read."""
        needed = len(ids) + max_tokens
        shared = 0
        for cached, token in zip(self._cached, ids[:-1], strict=False):
            if cached != token:
                break
            shared += 1
        if self._cache is None or needed > self._capacity or self._shortens(shared):
            self._capacity = min(limit, max(2 * needed, SMALLEST_CAPACITY))
            self._cache, shared = DecodingCache(self._model, self._capacity), 0
        self._cache.length = shared
        for block in self._cache.blocks.values():
            block.attention.length = min(block.attention.length, shared)
        self._cached = ids[:shared]
        return ids[shared:]

    def _shortens(self, shared: int) -> bool:
        """Return whether tokens must leave a cache that holds them pooled."""
        return bool(self._model.resizes) and shared < len(self._cached)

    def _advance(self, window: list[int]) -> int:
        """Read the tokens of `window`, and return the one that follows."""
        assert self._cache is not None
        # A pooled sequence is resumed token by token.
        pooled = bool(self._model.resizes) and self._cache.length > 0
        for part in [[token] for token in window] if pooled else [window]:
            token = next_token(self._worker, part, self._cache, self._sampling, self._generator)
            self._cached += part
        return token
