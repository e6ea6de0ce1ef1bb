"""Low-rank adapters of linear layers (LoRA, arXiv 2106.09685) on a frozen model.

A layer's class is replaced before parallelism is applied, and it gets two parameters: `lora_a`
(rank, inputs) and `lora_b` (outputs, rank). Every other parameter of the model is frozen.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from trainer.config.lora import LAYERS, LoraConfig, adapter_scale
from trainer.model import Transformer
from trainer.nn.init import stable_hash
from trainer.nn.layers import Block, BlockCache, Linear, keep_mask
from trainer.nn.sequence import SequenceInfo, Sequences


class AdaptedLinear(Linear):
    """A linear layer plus scale × B A of its input, after dropout; never merged in training."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale: float
    dropout: float
    site: Tensor  # distinguishes the dropout of different layers
    stream: SequenceInfo | None  # of the input; set by the block, if there is dropout

    def forward(self, input: Tensor) -> Tensor:
        low = F.linear(self._dropped_out(input), self.local_part("lora_a").to(input.dtype))
        output = super().forward(input)
        # One pass over the output, without a product of its size to scale and add. The copy of
        # B's transpose makes its gradient the fast product of two.
        up = self.local_part("lora_b").to(input.dtype).t().contiguous()
        rows = torch.addmm(output.flatten(0, -2), low.flatten(0, -2), up, alpha=self.scale)
        return rows.view_as(output)

    def _dropped_out(self, x_BSD: Tensor) -> Tensor:
        """Return the input after dropout, with the mask of its positions and input features."""
        stream = self.stream
        if not self.training or stream is None or stream.seeds_B is None:
            return x_BSD
        rows_S = stream.context.local_positions(stream.total, x_BSD.device)
        keep = keep_mask(stream.seeds_B, self.site, self.in_features, self.dropout, rows_S)
        keep = keep.narrow(-1, self.first_input(), x_BSD.shape[-1])
        return torch.where(keep, x_BSD * (1.0 / (1.0 - self.dropout)), 0.0)

    def first_input(self) -> int:
        """Return the first of the local input features; overridden if they are sharded."""
        return 0


class _AdaptedBlock(Block):
    """A block that tells its adapters which sequence their input is, for dropout."""

    def forward(
        self,
        x_BSD: Tensor,
        memory_BTD: Tensor | None,
        streams: Sequences,
        cache: BlockCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        # Here and not in the model: recomputation in a backward calls this again.
        self._set_streams(streams[self.stream], streams.get("source"))
        flow = super().forward(x_BSD, memory_BTD, streams, cache)
        self._set_streams(None, None)
        return flow

    def _set_streams(self, own: SequenceInfo | None, source: SequenceInfo | None) -> None:
        for name, module in self.named_modules():
            if isinstance(module, AdaptedLinear):
                of_memory = name in ("cross_attention.key", "cross_attention.value")
                module.stream = source if of_memory else own


def add_adapters(model: Transformer, config: LoraConfig) -> None:
    """Freeze a built model and add the adapters; call it before parallelism is applied."""
    if not config.rank:
        return
    model.requires_grad_(False)
    targets = config.targets or LAYERS
    for name, module in model.blocks.named_modules(prefix="blocks"):
        if isinstance(module, Linear) and name.rpartition(".")[2] in targets:
            _add_adapter(name, module, config)
    for block in model.blocks.values():
        if config.dropout:
            block.__class__ = _AdaptedBlock


@torch.no_grad()
def narrow_frozen(model: nn.Module, compute: torch.dtype) -> None:
    """Keep frozen weights in the dtype that they are computed in, in place.

    It changes no number, as every layer casts its weights to it. Shards of FSDP, whose groups have
    one dtype, and of split layers stay as they are.
    """
    for parameter in () if isinstance(model, FSDPModule) else model.parameters():
        if not parameter.requires_grad and not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(compute)


def _add_adapter(name: str, layer: Linear, config: LoraConfig) -> None:
    kind: type = type(layer)
    layer.__class__ = _adapted_class(kind)
    assert isinstance(layer, AdaptedLinear)
    layer.lora_a = nn.Parameter(layer.weight.new_empty(config.rank, layer.in_features))
    layer.lora_b = nn.Parameter(layer.weight.new_empty(layer.out_features, config.rank))
    layer.scale, layer.dropout, layer.stream = adapter_scale(config), config.dropout, None
    layer.site = torch.tensor(stable_hash(f"{name}.lora_dropout"), device="cpu")


@cache
def _adapted_class(kind: type) -> type[AdaptedLinear]:
    """Return one cached class for all such layers, so that identical blocks are compiled once."""
    return type(f"Adapted{kind.__name__}", (AdaptedLinear, kind), {})
