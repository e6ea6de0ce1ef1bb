"""One Transformer for three architectures: decoder, encoder with a classifier, encoder-decoder.

The contract with parallel/, held by tests:
1. blocks are in a ModuleDict keyed "0", "1", … and keep their names when others are removed;
2. `embed` and `head` may be None on a stage without them, and a forward may run any contiguous
   range of blocks;
3. the activations between blocks are one tuple (x, memory, marks), whose shapes `flow_like`
   returns, so that a pipeline can split a model at any block;
4. the number of heads is inferred from tensor shapes, so that a shard of a weight works too.
"""

# B batch, S sequence, T source sequence, D width, V vocabulary, C channels.

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from trainer.config.train import ModelConfig, head_width_of, outputs_of
from trainer.nn.audio import fill_with_silence
from trainer.nn.cache import DecodingCache, token_positions
from trainer.nn.ctc import CTCBranch
from trainer.nn.embeddings import TokenEmbedding, build_embedding, embedding_type
from trainer.nn.heads import auxiliary_heads, head_type
from trainer.nn.init import stable_hash
from trainer.nn.layers import Dropout, build_blocks
from trainer.nn.packed_attention import find_kernel
from trainer.nn.positions import build_relative_biases
from trainer.nn.queries import with_queries
from trainer.nn.rotary import rotary_angles
from trainer.nn.sequence import (
    Bias,
    BlockHook,
    Context,
    Flow,
    FullContext,
    FullSequence,
    Inputs,
    Resize,
    SequenceInfo,
    SequenceLayout,
    Sequences,
)


class Transformer(nn.Module):
    """A Transformer that computes in `dtype`, whatever the dtype of its parameters.

    Build it under `torch.device("meta")`; `draw_rows` gives the initial weights.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.layout: SequenceLayout = FullSequence()
        self.context: Context = FullContext()
        self.embedding_type, self.head_type = embedding_type(config), head_type(config)
        self.embed: nn.Module | None = build_embedding(config)
        self.blocks = nn.ModuleDict({str(i): b for i, b in enumerate(build_blocks(config))})
        self.relative_bias = nn.ModuleDict(build_relative_biases(config))  # of scores, by stream
        self.resizes: dict[int, Resize] = {}  # of a sequence, by the block before; -1: embedding
        self.auxiliary_heads = nn.ModuleDict(auxiliary_heads(config))  # by the block before them
        # Hooks on the flow after a block, which may add to its gradient; by the block's name.
        self.block_hooks: dict[str, list[BlockHook]] = defaultdict(list)
        # Set during a training step: adds a loss sum to the global mean, and returns it scaled.
        self.scale_auxiliary_loss: Callable[[Tensor], Tensor] | None = None
        self.depth = len(self.blocks)  # of the full model, also on a stage with fewer blocks
        self.encoder_depth = sum(block.stream == "source" for block in self.blocks.values())
        self.head: nn.Module | None = (head := self.head_type(config))
        self.ctc = CTCBranch(config) if config.ctc_weight else None
        tied = config.tied and outputs_of(config) == "tokens"
        if tied and isinstance(self.embed, TokenEmbedding):
            head.output.weight = self.embed.tokens.weight
        for name, module in self.named_modules():
            if isinstance(module, Dropout):
                module.site = torch.tensor(stable_hash(name), device="cpu")

    def forward(
        self,
        inputs: Inputs,
        cache: DecodingCache | None = None,
        flow: Flow | None = None,
        blocks: Sequence[str] | None = None,
    ) -> Tensor | Flow:
        """Return the logits of a micro-batch: (B,S,V), or (B,classes) for a classifier.

        `inputs` holds `tokens` (B,S), and `source` (B,T) for an encoder-decoder; or `images`
        (B,C,height,width), or `frames` (B,F,mels), as is the `source` of audio; optionally
        `documents` and `positions` (B,S) of packed samples, and `document_ends` (B,M), with which
        some devices need no mask; `source_valid` (B, vectors of the source) if there is padding,
        and `seeds` (B,) for dropout.
        In a pipeline, `blocks` are the ones to run and `flow` is the output of the block before
        them; a stage without the last block returns the flow instead of logits.
        """
        resumes = cache is not None and cache.length > 0  # the memory is cached already
        inputs = with_queries(inputs, self.config, self.training)
        streams = self._sequence_infos(inputs, cache)
        names = tuple(self.blocks) if blocks is None else blocks
        begins = int(names[0])
        if flow is None:
            flow = self._embed_inputs(inputs, streams, cache)
            begins = self.encoder_depth if resumes else -1
        elif resumes and cache is not None and self.encoder_depth:
            flow = flow[0], cache.memory, cache.marks
        streams = self._sequences_before(begins, streams, flow)
        if begins < 0:
            flow, streams = self._apply_resize(-1, flow, streams, cache)
        for name in names:
            flow, streams = self._run_block(name, flow, streams, inputs, cache)
        if cache is not None:
            if 0 < self.encoder_depth <= int(names[-1]) + 1:  # the encoder has finished
                _, cache.memory, cache.marks = flow
            if blocks is None:
                cache.advance(inputs)
        if self.head is None or int(names[-1]) != self.depth - 1:
            return flow
        return self.head(flow[0], streams[str(self.blocks[names[-1]].stream)])

    def _run_block(
        self,
        name: str,
        flow: Flow,
        streams: Sequences,
        inputs: Inputs,
        cache: DecodingCache | None,
    ) -> tuple[Flow, Sequences]:
        """Run one block, then its resize and its hook if it has them."""
        block, resumes = self.blocks[name], cache is not None and cache.length > 0
        if resumes and block.stream == "source":
            return flow, streams
        if not (resumes and flow[0].shape[1] == 0):  # a pooled group may not be complete yet
            own = None if cache is None else cache.blocks.get(name)
            flow = *block(*flow[:2], streams, own), flow[2]
        flow, streams = self._apply_resize(int(name), flow, streams, cache)
        for hook in self.block_hooks.get(name, ()):
            flow = hook(flow, streams, inputs)
        return flow, streams

    def flow_like(
        self, inputs: Inputs, block: int, cache: DecodingCache | None = None
    ) -> tuple[Tensor | None, ...]:
        """Return the input flow of a block as meta tensors: x, memory and marks, None if absent.

        For `block` = depth, return the logits. With a cache, the memory is sent only once.
        """
        inputs = with_queries(inputs, self.config, self.training)
        config, context = self.config, self.context if cache is None else FullContext()
        B, D = len(inputs["tokens" if self.decodes else self.embedding_type.source]), config.width
        lengths = self.sequence_lengths(inputs)

        def meta_empty(*sizes: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(B, *sizes, dtype=dtype, device="meta")

        def meta_flow(length: int) -> Tensor:
            return meta_empty(self.layout.part_length(context.local_length(length)), D)

        if block == self.depth:
            last = context.local_length(self._read_length(inputs))
            return (meta_empty(*self.head_type.logits_shape(config, last)),)
        start = 0 if cache is None else cache.length
        if not self.encoder_depth:
            S = lengths["target"]
            ends, _ = self._length_before(block, "target", start + S)
            length = ends - self._length_before(block, "target", start)[0]
            return meta_flow(length), meta_flow(S) if self._keeps_before(block) else None, None
        if self.decodes and start > 0:
            return meta_flow(lengths["target"]), None, None
        T, marked = self._length_before(block, "source", lengths["source"])
        marks = meta_empty(T, 2, dtype=torch.int32) if marked else None
        waits = meta_flow(lengths["target"]) if self.decodes else None
        if block < self.encoder_depth:
            return meta_flow(T), waits, marks
        return waits, meta_empty(context.local_length(T), D), marks

    @property
    def decodes(self) -> bool:
        """Return whether the model has decoder blocks."""
        return self.depth > self.encoder_depth

    def sequence_lengths(self, inputs: Inputs) -> dict[str, int]:
        """Return the length of each sequence of a micro-batch, in the order of the blocks."""
        lengths, inputs = {}, with_queries(inputs, self.config, self.training)
        if self.encoder_depth:
            length = self._source(inputs).shape[1]
            lengths["source"] = self.embedding_type.sequence_length(self.config, length)
        if self.decodes:
            lengths["target"] = inputs["tokens"].shape[1]
        return lengths

    def _source(self, inputs: Inputs) -> Tensor:
        """Return the encoder's input."""
        return inputs["source" if self.decodes else self.embedding_type.source]

    def _source_positions(self, inputs: Inputs) -> Tensor | None:
        """Return the positions of the encoder's input; those of packed samples restart."""
        if "positions" in inputs and not self.decodes:
            return inputs["positions"]
        return self.embedding_type.source_positions(self.config, self._source(inputs))

    def block_lengths(self, length: int) -> list[int]:
        """Return the sequence length at the input of each block of the encoder or decoder.

        An encoder-decoder gives those of its encoder. `length` is in tokens; images ignore it.
        """
        if not self.encoder_depth:
            return [self._length_before(i, "target", length)[0] for i in range(self.depth)]
        total = self.embedding_type.sequence_length(self.config, length)
        return [self._length_before(i, "source", total)[0] for i in range(self.encoder_depth)]

    def _resizes_before(self, block: int, stream: str) -> list[Resize]:
        found = [self.resizes[place] for place in sorted(self.resizes) if place < block]
        return [resize for resize in found if resize.stream == stream]

    def _keeps_before(self, block: int) -> bool:
        """Return whether the full-length sequence enters a block along with the shortened one."""
        found = self._resizes_before(block, "target")
        return bool(found) and found[-1].keeps_full_sequence

    def _length_before(self, block: int, stream: str, length: int) -> tuple[int, bool]:
        """Return the length of a sequence at the input of a block, and whether it has marks."""
        marked, total = False, length
        for resize in self._resizes_before(block, stream):
            if resize.restores_length:
                length = total
            else:
                length = resize.output_length(length, self.training)
            marked = marked or resize.marks
        return length, marked

    def _sequences_before(self, block: int, streams: Sequences, flow: Flow) -> Sequences:
        """Return the sequence metadata at the input of a block, given its input flow."""
        for place in sorted(place for place in self.resizes if place < block):
            streams = self._sequence_after(place, streams, None)
        if flow[2] is None:
            return streams
        return streams | {"source": streams["source"].with_marks(flow[2], self.dtype)}

    def _apply_resize(
        self, place: int, flow: Flow, streams: Sequences, cache: DecodingCache | None
    ) -> tuple[Flow, Sequences]:
        """Resize the flow after a block (-1: the embedding) if a module is registered there."""
        if place not in self.resizes:
            return flow, streams
        resize, own = self.resizes[place], {} if cache is None else cache.resizes[place]
        flow = resize(flow, streams[resize.stream], self.training, own)
        return flow, self._sequence_after(place, streams, flow[2])

    def _sequence_after(self, place: int, streams: Sequences, marks: Tensor | None) -> Sequences:
        resize = self.resizes[place]
        stream = resize.sequence_after(streams[resize.stream], self.training)
        if marks is not None:
            stream = stream.with_marks(marks, self.dtype)
        return streams | {resize.stream: stream}

    def _embed_inputs(
        self, inputs: Inputs, streams: Sequences, cache: DecodingCache | None
    ) -> Flow:
        """Return the initial flow; an encoder-decoder embeds the source and the waiting target."""
        assert self.embed is not None
        target: Tensor | None = None
        if self.decodes:
            positions_BS, tokens_BS = token_positions(inputs, cache), inputs["tokens"]
            if self.config.start_token >= 0:
                first = torch.full_like(tokens_BS, self.config.start_token)
                tokens_BS = torch.where(positions_BS == 0, first, tokens_BS)
            target = self.embed(tokens_BS, positions_BS, streams["target"], self.dtype)
            if cache is not None and cache.length > 0:
                return target, cache.memory, cache.marks
        if self.encoder_depth:
            read = self._source(inputs)
            positions_BT = self._source_positions(inputs)
            if self.config.audio_fill == "silence":
                read = fill_with_silence(read, inputs.get("source_valid"), self.config)
            source = self.embed(read, positions_BT, streams["source"], self.dtype)
            return source, target, None
        assert target is not None
        return target, None, None

    def _sequence_infos(self, inputs: Inputs, cache: DecodingCache | None) -> Sequences:
        seeds_B = inputs.get("seeds")
        # Generation does not shard sequences over context ranks.
        context = self.context if cache is None else FullContext()
        lengths, streams = self.sequence_lengths(inputs), {}
        if self.encoder_depth:
            read = self._source(inputs)
            valid_BS = None if self.config.audio_fill == "silence" else inputs.get("source_valid")
            streams["source"] = self._sequence_info(
                lengths["source"],
                context,
                read,
                seeds_B,
                self._source_positions(inputs),
                documents={} if self.decodes else inputs,
                valid_BS=valid_BS,
            )
            streams["source"].segments_BS = inputs.get("segments")
        if not self.decodes:
            return streams
        # The embedding is shared: the target's dropout mask must differ from the source's.
        seeds_B = None if seeds_B is None else ~seeds_B
        streams["target"] = self._sequence_info(
            lengths["target"],
            context,
            inputs["tokens"],
            seeds_B,
            token_positions(inputs, cache),
            causal=not self.config.queries,
            documents=inputs,
            start=0 if cache is None else cache.length,
        )
        return streams

    def _sequence_info(
        self,
        total: int,
        context: Context,
        read: Tensor,
        seeds_B: Tensor | None,
        positions_BS: Tensor | None = None,
        *,
        documents: Inputs,
        causal: bool = False,
        valid_BS: Tensor | None = None,
        start: int = 0,
    ) -> SequenceInfo:
        rows_S = context.local_positions(total, read.device)
        own_BS = None if positions_BS is None else context.take_local(positions_BS)
        stream = SequenceInfo(
            len(rows_S),
            total,
            self.layout,
            context,
            causal,
            positions_S=self.layout.local_positions(rows_S[None, :, None])[0, :, 0],
            documents_BS=documents.get("documents"),
            ends_BM=documents.get("document_ends"),
            valid_BS=valid_BS,
            kernel=find_kernel(read.device, self.dtype, head_width_of(self.config)),
            seeds_B=seeds_B,
            relative=self._relative_bias("target" if causal else "source"),
            rope=self._rotary_angles(own_BS),
            angles=self._rotary_angles,
            start=start,
        )
        stream.hide_keys(len(read))
        if causal and self.config.sliding_window:
            stream.windowed = replace(stream, rope=self._rotary_angles(own_BS, windowed=True))
            if start + total > self.config.sliding_window:  # otherwise it hides nothing
                stream.windowed.window = self.config.sliding_window
                stream.windowed.hide_keys(len(read))
        return stream

    def _relative_bias(self, stream: str) -> Bias | None:
        """Return the bias of a stream's attention scores, if it has one."""
        table = dict(self.relative_bias.items()).get(stream)
        return None if table is None else partial(table, self.dtype)

    def output_length(self, inputs: Inputs) -> int | None:
        """Return the number of positions that logits are of; None = of the sequence."""
        return None if self.head_type.pools else self._read_length(inputs)

    def _read_length(self, inputs: Inputs) -> int:
        """Return the length of the sequence that the head reads."""
        stream = "target" if self.decodes else "source"
        return self._length_before(self.depth, stream, self.sequence_lengths(inputs)[stream])[0]

    def local_targets(self, targets: Tensor) -> Tensor:
        """Return the targets of a micro-batch that this rank trains on."""
        targets = self.head_type.position_targets(self.config, self.resized_targets(targets))
        return self.head_type.local_targets(targets, self.context)

    def resized_targets(self, targets: Tensor) -> Tensor:
        """Return the targets of the vectors that an encoder's resizes leave."""
        if self.decodes or not self.resizes:
            return targets
        left = partial(self._length_before, self.depth, "source")
        return self.head_type.resized_targets(targets, lambda length: left(length)[0])

    def _rotary_angles(
        self, positions_BS: Tensor | None, windowed: bool = False
    ) -> tuple[Tensor, Tensor] | None:
        if positions_BS is None or self.config.positions != "rope":
            return None
        precise = torch.promote_types(self.dtype, torch.float32)
        return rotary_angles(positions_BS, self.config, precise, windowed)
