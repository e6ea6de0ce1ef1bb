"""One Transformer in three shapes: decoder, encoder with a classifier, encoder-decoder.

The contract with parallel/, which tests hold:
1. blocks stand in a ModuleDict keyed "0", "1", … and keep their names when others are taken out;
2. `embed` and `head` may be None where they are not needed, and a forward may be of any run of
   blocks;
3. what flows between blocks is one tuple (x, memory, marks), which `flow_like` describes, so that
   any model can be cut anywhere;
4. numbers of heads are read from tensor shapes, so that a shard of a weight just works.
"""

# B batch, S sequence, T source sequence, D width, V vocabulary, C channels.

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from trainer.config.train import ModelConfig, outputs_of
from trainer.nn.embeddings import TokenEmbedding, embedding_type
from trainer.nn.heads import head_type
from trainer.nn.init import stable_hash
from trainer.nn.layers import AttentionCache, Block, BlockCache, Dropout, rotary_angles
from trainer.nn.sequence import (
    Context,
    Flow,
    FullContext,
    FullSequence,
    Inputs,
    Resize,
    SequenceLayout,
    Stream,
    Watcher,
)

# How tensor parallelism splits the layers: pattern of parameter names -> a style that
# parallel/tensor/layers.py explains.
TENSOR_LAYOUT = {
    "embed.tokens": "vocabulary",
    "embed.positions": "sequence",
    "embed.patches": "sequence",
    "embed.class_token": "sequence",
    "blocks.*_norm": "sequence",
    "blocks.*attention.query": "heads",
    "blocks.*attention.key": "heads",
    "blocks.*attention.value": "heads",
    "blocks.*attention.output": "row",
    "blocks.*.feed_forward.gate": "column",
    "blocks.*.feed_forward.up": "column",
    "blocks.*.feed_forward.down": "row",
    "head.norm": "sequence",
    "head.output": "vocabulary",
}


class DecodingCache:
    """Keys and values of the tokens generated so far: a cache per decoder block, and the memory."""

    def __init__(self, model: "Transformer", capacity: int):
        self.length = 0  # tokens cached so far
        self.memory: Tensor | None = None
        self.marks: Tensor | None = None  # of the memory
        self.resizes: dict[int, dict[str, Tensor]] = {place: {} for place in model.resizes}
        self.blocks = {
            name: BlockCache(AttentionCache(capacity), AttentionCache(0))
            for name, block in model.blocks.items()
            if block.stream == "target"
        }

    def advance(self, inputs: Inputs) -> None:
        """Go on behind the tokens of these inputs; after the last block has seen them."""
        self.length += inputs["tokens"].shape[1]

    def reorder(self, rows_B: Tensor) -> None:
        """Keep the given rows of the batch."""
        self.memory = None if self.memory is None else self.memory[rows_B]
        self.marks = None if self.marks is None else self.marks[rows_B]
        for remembered in self.resizes.values():
            remembered.update({name: tensor[rows_B] for name, tensor in remembered.items()})
        for block in self.blocks.values():
            block.attention.reorder(rows_B)
            block.cross.reorder(rows_B)


class Transformer(nn.Module):
    """The model; computes in `dtype` whatever its parameters are kept in.

    Build it under `torch.device("meta")`; weights come from `draw_rows`.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.layout: SequenceLayout = FullSequence()
        self.context: Context = FullContext()
        self.embedding_type, self.head_type = embedding_type(config), head_type(config)
        self.embed: nn.Module | None = self.embedding_type(config)
        self.blocks = nn.ModuleDict({str(i): block for i, block in enumerate(_blocks(config))})
        # What makes a sequence shorter, by the block that it comes behind (-1: the embedding).
        self.resizes: dict[int, Resize] = {}
        # What looks at the vectors behind a block, and may join their gradient; by its name.
        self.watchers: dict[str, Watcher] = {}
        # In a training step: a sum over valid targets as its share of the mean loss, counted in.
        self.share_of_mean: Callable[[Tensor], Tensor] | None = None
        self.depth = len(self.blocks)  # of the whole model, also where blocks are taken out
        self.encoder_depth = sum(block.stream == "source" for block in self.blocks.values())
        head = self.head_type(config)
        self.head: nn.Module | None = head
        if (
            config.tied
            and isinstance(self.embed, TokenEmbedding)
            and outputs_of(config) == "tokens"
        ):
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
        """Logits of one micro-batch: (B,S,V), or (B,classes) of a classifier.

        `inputs` holds `tokens` (B,S), and `source` (B,T) for an encoder-decoder, or `images`
        (B,C,height,width); optionally `documents` and `positions` (B,S) of packed samples,
        `source_valid` (B,T) where there is padding, and `seeds` (B,) for dropout.
        Of a model that is cut, `blocks` are the ones to run and `flow` what the block before the
        first of them has returned; what the last of them returns is returned.
        """
        resumes = cache is not None and cache.length > 0  # the memory is what the source has made
        streams = self._streams(inputs, cache)
        names = tuple(self.blocks) if blocks is None else blocks
        begins = int(names[0])
        if flow is None:
            flow = self._embed(inputs, streams, cache)
            begins = self.encoder_depth if resumes else -1
        elif resumes and cache is not None and self.encoder_depth:
            flow = flow[0], cache.memory, cache.marks
        streams = self._streams_before(begins, streams, flow)
        if begins < 0:
            flow, streams = self._resized(-1, flow, streams, cache)
        for name in names:
            flow, streams = self._through(name, flow, streams, inputs, cache)
        if cache is not None:
            if 0 < self.encoder_depth <= int(names[-1]) + 1:  # the last of the encoder has turned
                _, cache.memory, cache.marks = flow
            if blocks is None:
                cache.advance(inputs)
        if self.head is None or int(names[-1]) != self.depth - 1:
            return flow
        return self.head(flow[0], streams[str(self.blocks[names[-1]].stream)])

    def _through(
        self,
        name: str,
        flow: Flow,
        streams: dict[str, Stream],
        inputs: Inputs,
        cache: DecodingCache | None,
    ) -> tuple[Flow, dict[str, Stream]]:
        """One block, and what stands behind it."""
        block, resumes = self.blocks[name], cache is not None and cache.length > 0
        if resumes and block.stream == "source":
            return flow, streams
        x, memory, marks = flow
        if not (resumes and x.shape[1] == 0):  # no new group of tokens may be complete yet
            own = None if cache is None else cache.blocks.get(name)
            flow = *block(x, memory, streams, own), marks
        flow, streams = self._resized(int(name), flow, streams, cache)
        if name in self.watchers:
            flow = self.watchers[name](flow, streams, inputs)
        return flow, streams

    def flow_like(
        self, inputs: Inputs, block: int, cache: DecodingCache | None = None
    ) -> tuple[Tensor | None, ...]:
        """Return what flows into a block, as meta tensors: x, memory and marks, where there are
        any.

        Behind the last block: the logits. With a cache, the memory flows once.
        """
        config, context = self.config, self.context if cache is None else FullContext()
        B, D = len(inputs["tokens" if self.decodes else self.embedding_type.source]), config.width
        lengths = self.sequence_lengths(inputs)

        def like(*sizes: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(B, *sizes, dtype=dtype, device="meta")

        def flows(length: int) -> Tensor:
            return like(self.layout.part_length(context.share(length)), D)

        if block == self.depth:
            last = context.share(lengths["target" if self.decodes else "source"])
            return (like(*self.head_type.logits_shape(config, last)),)
        start = 0 if cache is None else cache.length
        if not self.encoder_depth:
            S = lengths["target"]
            ends, _ = self._length_before(block, "target", start + S)
            length = ends - self._length_before(block, "target", start)[0]
            return flows(length), flows(S) if self._keeps_before(block) else None, None
        if self.decodes and start > 0:
            return flows(lengths["target"]), None, None
        T, marked = self._length_before(block, "source", lengths["source"])
        marks = like(T, 2, dtype=torch.int32) if marked else None
        waits = flows(lengths["target"]) if self.decodes else None
        if block < self.encoder_depth:
            return flows(T), waits, marks
        return waits, like(context.share(T), D), marks

    @property
    def decodes(self) -> bool:
        """Return whether the model has blocks of a decoder."""
        return self.depth > self.encoder_depth

    def sequence_lengths(self, inputs: Inputs) -> dict[str, int]:
        """Return the positions of each sequence of a micro-batch, in the order of the blocks."""
        lengths = {}
        if self.encoder_depth:
            length = self._source(inputs).shape[1]
            lengths["source"] = self.embedding_type.sequence_length(self.config, length)
        if self.decodes:
            lengths["target"] = inputs["tokens"].shape[1]
        return lengths

    def _source(self, inputs: Inputs) -> Tensor:
        """Return what the encoder reads."""
        return inputs["source" if self.decodes else self.embedding_type.source]

    def lengths(self, length: int) -> list[int]:
        """Vectors in front of each block of the encoder, or of a decoder alone.

        Of an image, or of so many tokens.
        """
        if not self.encoder_depth:
            return [self._length_before(i, "target", length)[0] for i in range(self.depth)]
        total = self.embedding_type.sequence_length(self.config, length)
        return [self._length_before(i, "source", total)[0] for i in range(self.encoder_depth)]

    def _resizes_before(self, block: int, stream: str) -> list[Resize]:
        found = [self.resizes[place] for place in sorted(self.resizes) if place < block]
        return [resize for resize in found if resize.stream == stream]

    def _keeps_before(self, block: int) -> bool:
        """Return whether a longer sequence flows into a decoder's block beside its own."""
        found = self._resizes_before(block, "target")
        return bool(found) and found[-1].keeps

    def _length_before(self, block: int, stream: str, length: int) -> tuple[int, bool]:
        """Vectors of a sequence in front of a block, and whether they have marks."""
        marked, total = False, length
        for resize in self._resizes_before(block, stream):
            length = total if resize.restores else resize.length(length, self.training)
            marked = marked or resize.marks
        return length, marked

    def _streams_before(
        self, block: int, streams: dict[str, Stream], flow: Flow
    ) -> dict[str, Stream]:
        """Return the streams as they are in front of a block that the flow flows into."""
        for place in sorted(place for place in self.resizes if place < block):
            streams = self._behind(place, streams, None)
        if flow[2] is None:
            return streams
        return streams | {"source": streams["source"].marked(flow[2], self.dtype)}

    def _resized(
        self, place: int, flow: Flow, streams: dict[str, Stream], cache: DecodingCache | None
    ) -> tuple[Flow, dict[str, Stream]]:
        """Flow and streams behind a block, or behind the embedding."""
        if place not in self.resizes:
            return flow, streams
        resize, own = self.resizes[place], {} if cache is None else cache.resizes[place]
        flow = resize(flow, streams[resize.stream], self.training, own)
        return flow, self._behind(place, streams, flow[2])

    def _behind(
        self, place: int, streams: dict[str, Stream], marks: Tensor | None
    ) -> dict[str, Stream]:
        resize = self.resizes[place]
        stream = resize.stream_behind(streams[resize.stream], self.training)
        if marks is not None:
            stream = stream.marked(marks, self.dtype)
        return streams | {resize.stream: stream}

    def _embed(
        self, inputs: Inputs, streams: dict[str, Stream], cache: DecodingCache | None
    ) -> Flow:
        """Return what flows first: of an encoder-decoder the source, and the target that waits."""
        assert self.embed is not None
        target: Tensor | None = None
        if self.decodes:
            positions_BS = _positions(inputs, cache)
            target = self.embed(inputs["tokens"], positions_BS, streams["target"], self.dtype)
            if cache is not None and cache.length > 0:
                return target, cache.memory, cache.marks
        if self.encoder_depth:
            read = self._source(inputs)
            positions_BT = self.embedding_type.source_positions(read)
            source = self.embed(read, positions_BT, streams["source"], self.dtype)
            return source, target, None
        assert target is not None
        return target, None, None

    def _streams(self, inputs: Inputs, cache: DecodingCache | None) -> dict[str, Stream]:
        seeds_B = inputs.get("seeds")
        # A token that is written has no sequence to share.
        context = self.context if cache is None else FullContext()
        lengths, streams = self.sequence_lengths(inputs), {}
        if self.encoder_depth:
            read = self._source(inputs)
            streams["source"] = self._stream(
                lengths["source"],
                context,
                read.device,
                seeds_B,
                self.embedding_type.source_positions(read),
                valid_BS=inputs.get("source_valid"),
            )
        if not self.decodes:
            return streams
        # The target's dropout must not repeat the source's, which shares the embedding.
        seeds_B = None if seeds_B is None else ~seeds_B
        streams["target"] = self._stream(
            lengths["target"],
            context,
            inputs["tokens"].device,
            seeds_B,
            _positions(inputs, cache),
            causal=True,
            documents_BS=inputs.get("documents"),
            start=0 if cache is None else cache.length,
        )
        return streams

    def _stream(
        self,
        total: int,
        context: Context,
        device: torch.device,
        seeds_B: Tensor | None,
        positions_BS: Tensor | None = None,
        *,
        causal: bool = False,
        documents_BS: Tensor | None = None,
        valid_BS: Tensor | None = None,
        start: int = 0,
    ) -> Stream:
        rows_S = context.positions(total, device)
        stream = Stream(
            len(rows_S),
            total,
            self.layout,
            context,
            causal,
            places_S=self.layout.own(rows_S[None, :, None])[0, :, 0],
            documents_BS=documents_BS,
            valid_BS=valid_BS,
            seeds_B=seeds_B,
            rope=None if positions_BS is None else self._rope(context.take(positions_BS)),
            angles=self._rope,
            start=start,
        )
        if not context.shares and (documents_BS is not None or valid_BS is not None):
            stream.mask = stream.visible(rows_S, rows_S)
        return stream

    def own_targets(self, targets: Tensor) -> Tensor:
        """Return the targets of a micro-batch that this rank trains on."""
        return self.head_type.local_targets(targets, self.context)

    def _rope(self, positions_BS: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.config.positions != "rope":
            return None
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return rotary_angles(positions_BS, self.config, dtype)


def _blocks(config: ModelConfig) -> list[Block]:
    if config.family == "encoder":
        return [Block(config, "source") for _ in range(config.layers)]
    if config.family == "decoder":
        return [Block(config, "target") for _ in range(config.layers)]
    depth = config.encoder_layers or config.layers
    encoder = [Block(config, "source", turns=i == depth - 1) for i in range(depth)]
    return encoder + [Block(config, "target", cross=True) for _ in range(config.layers)]


def _positions(inputs: Inputs, cache: DecodingCache | None) -> Tensor:
    if "positions" in inputs:
        return inputs["positions"]
    start = 0 if cache is None else cache.length
    length = inputs["tokens"].shape[1]
    return torch.arange(start, start + length, device=inputs["tokens"].device)[None]
