"""Export a trained model as one compact file, which any layout can load."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from parallel.grad_norm import local_tensor
from parallel.parallel_model import ParallelModel
from parallel.parallelize import local_slices
from trainer.atomic_files import new_folder
from trainer.checkpoint.restore import base_weights
from trainer.checkpoint.shards import take_rows
from trainer.checkpoint.vocabulary import BY_ROW
from trainer.compress.compression import Compression
from trainer.compress.packing import pack_weight, unpack_weight
from trainer.compress.quantized_linear import (
    CompressedLinear,
    QuantizationSpec,
    quantize_to_integers,
)
from trainer.config.train import CompressConfig, ConfigError, TrainConfig
from trainer.data.record import copy_record
from trainer.run.run_dir import EXPORTED, to_yaml

VERSION = "1"


def write_export(
    worker: ParallelModel, config: TrainConfig, dtype: torch.dtype, run_dir: Path, to: Path
) -> None:
    """Write the folder `to` from a model on one rank; ConfigError if it cannot be written.

    It holds the weights (unquantized ones as `dtype`), their `config`, and the record of the data
    of `run_dir`. If writing fails, no partial folder is left.
    """
    lens = Compression(config.compress).lens
    tensors, packed = {}, []
    compressed = {
        f"{prefix}.weight"
        for prefix, module in worker.model.named_modules()
        if isinstance(module, CompressedLinear)
    }
    for name, parameter in worker.parameters().items():
        weight = parameter.detach().cpu()
        if name not in compressed:
            tensors[name] = weight.to(dtype).contiguous()
            continue
        packed.append(name)
        for part, tensor in pack_weight(weight, lens).items():
            tensors[f"{name}.{part}"] = tensor.to(dtype) if part == "values" else tensor
    about = {"version": VERSION, "packed": json.dumps(packed)}
    with new_folder(to) as partial:
        (partial / EXPORTED).write_bytes(save(tensors, metadata=about))
        (partial / "config.yaml").write_text(to_yaml(config))
        copy_record(run_dir, partial)


def load_export(
    folder: Path, worker: ParallelModel, compress: CompressConfig, rows: list[int] | None = None
) -> None:
    """Load an exported model into the local shards of a worker's parameters.

    `compress` is that of the exported run; `rows` as for `load_export` in trained_run.py. Raises
    ConfigError if the file is damaged or belongs to another model.
    """
    path, lens = folder / EXPORTED, Compression(compress).lens
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            names = set(file.keys())
            if about.get("version") != VERSION:
                raise ConfigError(f"{path} has an unsupported export version; export the run again")
            packed = set(json.loads(about["packed"]))
            for name, parameter in base_weights(worker).items():
                if name in packed:
                    parts = {
                        key.removeprefix(f"{name}."): file.get_tensor(key)
                        for key in names
                        if key.startswith(f"{name}.")
                    }
                    weight = unpack_weight(parts, lens, parameter.shape[1])
                else:
                    weight = file.get_tensor(name)
                if rows is not None and name in BY_ROW:
                    take_rows(parameter, weight, rows)
                    continue
                if weight.shape != parameter.shape:
                    raise ConfigError(
                        f"{path} has {name} of shape {tuple(weight.shape)}, the model of "
                        f"{tuple(parameter.shape)}; export the run again"
                    )
                with torch.no_grad():
                    local_tensor(parameter).copy_(weight[local_slices(parameter)])
    except (SafetensorError, KeyError, OSError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error}); export the run again") from error


def compute_with_integers(model: nn.Module) -> None:
    """Replace the weight of every layer that integer kernels support by int8 values."""
    for module in model.modules():
        if isinstance(module, CompressedLinear) and IntegerLinear.is_supported(module.lens):
            numbers, scale = quantize_to_integers(module.weight.detach(), module.lens.bits)
            module.__class__ = IntegerLinear
            module.register_buffer("numbers", numbers.to(torch.int8))
            module.register_buffer("scale", scale.flatten())
            module.register_parameter("weight", None)


class IntegerLinear(CompressedLinear):
    """A quantized linear layer for inference: an int8 matrix product, then the scales."""

    numbers: Tensor
    scale: Tensor

    @staticmethod
    def is_supported(lens: QuantizationSpec) -> bool:
        """Return whether weights and inputs are quantized, with one weight scale per output."""
        return bool(lens.bits and lens.input_bits and not lens.group)

    def forward(self, input: Tensor) -> Tensor:
        numbers, of_input = quantize_to_integers(input.flatten(0, -2), self.lens.input_bits)
        product = torch._int_mm(numbers.to(torch.int8), self.numbers.T)
        x = (product.to(input.dtype) * (of_input * self.scale)).view(*input.shape[:-1], -1)
        return x if self.bias is None else x + self.bias.to(x.dtype)
