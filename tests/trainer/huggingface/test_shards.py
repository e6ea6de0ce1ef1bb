"""A folder read by several ranks: each reads its own part of the weights, under every layout."""

from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers

from parallel.grad_norm import local_tensor
from parallel.parallelize import local_slices
from parallel.runtime import Runtime
from parallel.strategy import StrategyConfig
from trainer.build import parallel_model
from trainer.huggingface.registry import read_model
from trainer.huggingface.tensor_files import TensorFiles
from trainer.huggingface.weights import WeightReader, load_folder
from trainer.precision import resolve_precision

LAYOUTS = {
    "fsdp 4": StrategyConfig(shard=4),
    "fsdp 2 × tensor 2": StrategyConfig(shard=2, tensor=2),
    "tensor 2 × pipeline 2": StrategyConfig(tensor=2, pipeline=2),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {}
    llama = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    gpt2 = transformers.GPT2Config(vocab_size=50, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    for config, model_class in (
        (llama, transformers.LlamaForCausalLM),
        (gpt2, transformers.GPT2LMHeadModel),
    ):
        folder = made[config.model_type] = tmp_path_factory.mktemp(config.model_type)
        model_class(config).save_pretrained(folder, max_shard_size="100KB")
    return made


def load_part(runtime: Runtime, folder: Path, strategy: StrategyConfig) -> tuple[int, int, bool]:
    """Return how many numbers this rank has read and holds, and whether they are the folder's."""
    model = read_model(folder)[1]
    worker = parallel_model(model, strategy, runtime, resolve_precision("fp32", runtime.device))
    numbers = []
    read = TensorFiles.read

    def count(self: TensorFiles, name: str, *slices: slice) -> torch.Tensor:
        numbers.append(read(self, name, *slices))
        return numbers[-1]

    with mock.patch.object(TensorFiles, "read", count):
        load_folder(folder, worker.parameters())
    reader, parameters = WeightReader(folder), worker.parameters()
    same = all(
        local_tensor(p.detach()).equal(reader.read_whole(name)[local_slices(p)])
        for name, p in parameters.items()
    )
    held = sum(local_tensor(p).numel() for p in parameters.values())
    return sum(tensor.numel() for tensor in numbers), held, same


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_rank_reads_what_it_holds(ranks, folders, kind, layout):
    for read, held, same in ranks.run(4, load_part, folders[kind], LAYOUTS[layout]):
        assert same
        assert read == held
