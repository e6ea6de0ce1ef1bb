"""Tensor parallelism: layout table, shards, saved activations and communication."""

import time
from dataclasses import replace
from itertools import product
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
from tiny import each
from torch import distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.comm_volume.counter import CollectiveCounter
from parallel.errors import ConfigError
from parallel.grad_norm import local_tensor
from parallel.runtime import Runtime, check_same_on_all_ranks
from parallel.strategy import StrategyConfig
from parallel.tensor.layers import SEQUENCE, STYLES, matches_pattern, style_of
from parallel.tensor.vocab_parallel import VocabParallel
from trainer import build
from trainer.build import parallel_model
from trainer.config.train import ModelConfig, TrainConfig
from trainer.data import data_fingerprint, prepare_data
from trainer.model import Transformer
from trainer.nn.tensor_layout import TENSOR_LAYOUT
from trainer.precision import PRECISIONS, Precision
from trainer.verify.cases import DETECTORS, FAMILIES, make_batch, scale_down, split_batch
from trainer.verify.features import FEATURES

GPT = ModelConfig(
    layers=1,
    width=256,
    heads=4,
    ffn_width=1024,
    vocab_size=64,
    max_positions=64,
    dropout=0.1,
    norm="layernorm",
    activation="gelu_tanh",
    positions="learned",
    bias=True,
)
HALF = Precision("half", torch.bfloat16, torch.bfloat16)  # as the paper counts: 2 bytes, no casts


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_names_every_parameter_once(family):
    config = replace(FAMILIES[family], vocab_size=61, max_positions=8, image_size=8, channels=3)
    with torch.device("meta"):
        model = Transformer(replace(config, classes=7))
    styles = {name: style_of(name, TENSOR_LAYOUT) for name, _ in model.named_parameters()}
    assert set(styles.values()) <= set(STYLES)
    # What is not split is small: no matrix inside a block, no token embedding, no output.
    for name, parameter in model.named_parameters():
        if styles[name] == SEQUENCE and parameter.dim() > 1:
            assert name in ("embed.positions.weight", "embed.patches.weight", "embed.class_token")


def test_every_pattern_matches_a_parameter():
    names = []
    sandwich = replace(FAMILIES["encoder-decoder"], norm_placement="sandwich")
    sets = replace(DETECTORS["encoder-decoder (DETR)"], layers=2, auxiliary_heads=True)
    for config in (*FAMILIES.values(), *FEATURES.values(), sandwich, sets):
        sized = replace(config, vocab_size=61, max_positions=8, image_size=8, channels=3, classes=7)
        with torch.device("meta"):
            names += [name for name, _ in Transformer(sized).named_parameters()]
    for pattern in TENSOR_LAYOUT:
        assert any(matches_pattern(name, pattern) for name in names), pattern


class Alive(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still there, without the model's."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self._weights = {local_tensor(p).untyped_storage()._cdata for p in model.parameters()}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._weights:
                    self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return made

    def total_bytes(self) -> int:
        """Of those that stay alive: gloo's threads hold what they have sent a little longer."""
        least = sum(size for _, size in self._made.values())
        for _ in range(20):
            alive = (size for reference, size in self._made.values() if not reference.expired())
            least = min(least, sum(alive))
            time.sleep(0.02)
        return least


def kept_bytes(runtime: Runtime, strategy: StrategyConfig, samples: int, length: int) -> float:
    """Return the bytes that one more layer saves for the backward."""
    totals = []
    for layers in (1, 3):
        worker = parallel_model(replace(GPT, layers=layers), strategy, runtime, HALF)
        tokens = torch.zeros(samples, length, dtype=torch.int64)
        inputs = {"tokens": tokens, "seeds": torch.arange(samples)}
        with Alive(worker.model) as alive:
            logits = worker.model(inputs)
            totals.append(alive.total_bytes())
        del logits
    return (totals[1] - totals[0]) / 2


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_a_layer_keeps_as_much_as_the_paper_says(ranks, degree, sequence_parallel):
    strategy = StrategyConfig(tensor=degree, sequence_parallel=sequence_parallel)
    B, S, D = 2, 64, GPT.width
    kept = ranks.run(degree, kept_bytes, strategy, B, S)[0]
    # arXiv 2205.05198, table 2, without the attention scores, which a fused kernel never keeps.
    factor = 34 / degree if sequence_parallel else 10 + 24 / degree
    assert kept == pytest.approx(factor * B * S * D, rel=0.1)


def vocabulary_loss(
    runtime: Runtime, classes: int, smoothing: float | None, scale: float
) -> list[float]:
    """Largest differences from torch of the loss, its gradient and the gathered logits.

    Without a smoothing the targets are probabilities.
    """
    vocabulary = VocabParallel(classes, dist.group.WORLD)
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(9, classes, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, classes, (9,), generator=generator)
    targets[[2, 7]] = -100
    own = logits[:, vocabulary.first : vocabulary.first + vocabulary.own].clone()
    options = {"ignore_index": -100, "reduction": "sum", "label_smoothing": smoothing}
    if smoothing is None:
        targets = torch.rand(9, classes, dtype=torch.float64, generator=generator)
        targets[[2, 7]] = 0.0
        options = {"reduction": "sum"}
    ours = vocabulary.cross_entropy(own.requires_grad_(), targets, **options)
    theirs = torch.nn.functional.cross_entropy(logits.requires_grad_(), targets, **options)
    (2 * ours).backward()
    (2 * theirs).backward()
    due = logits.grad[:, vocabulary.first : vocabulary.first + vocabulary.own]
    gap = (own.grad - due).abs().max().item() if vocabulary.own else 0.0
    whole = vocabulary.gather_logits(own.detach())
    return [abs(ours.item() - theirs.item()), gap, (whole - logits).abs().max().item()]


def test_the_loss_of_a_split_vocabulary_is_torch_s(ranks):
    classes = (12, 11, 5, 2)  # even, uneven, a rank with none, two with none
    calls = list(product(classes, (0.0, 0.1, None), (1.0, 1e3)))
    for found in ranks.run(4, each, vocabulary_loss, calls):
        for call, differences in zip(calls, found, strict=True):
            assert max(differences) < 1e-12 * 9 * call[2], call


def shared_key(runtime: Runtime) -> tuple[int, int]:
    """Rows of a key's weight that a rank has, and all of them."""
    config = replace(scale_down(FAMILIES["decoder (Llama)"]), heads=4, kv_heads=1)
    worker = parallel_model(config, StrategyConfig(tensor=4), runtime, PRECISIONS["fp64"])
    weight = dict(worker.model.named_parameters())["blocks.0.attention.key.weight"]
    return local_tensor(weight).shape[0], weight.shape[0]


def test_a_shared_head_lies_in_parts(ranks):
    # One head of width 8 over four ranks: no rank keeps a copy, nor a copy's optimizer state.
    assert ranks.run(4, shared_key) == [(2, 8)] * 4


def activation_bytes(runtime: Runtime, mode: str) -> dict[str, int]:
    """Return a step's activation bytes by collective."""
    worker = parallel_model(
        scale_down(FAMILIES["decoder (Llama)"]),
        StrategyConfig(tensor=2),
        runtime,
        PRECISIONS["bf16"],
        activation_checkpointing=mode,
    )
    micro_batches = split_batch(make_batch(worker.model.config, 0, 0), worker)
    with CollectiveCounter() as traffic:
        worker.forward_backward(micro_batches)
    return {
        name: size
        for (name, dtype), size in traffic.payload_bytes.items()
        if dtype == torch.bfloat16
    }


def test_kept_collectives_are_not_repeated(ranks):
    none, selective, block = (
        ranks.run(2, activation_bytes, mode)[0] for mode in ("none", "selective", "block")
    )
    assert selective == none
    assert block["reduce_scatter"] > none["reduce_scatter"]


def differing(runtime: Runtime, odd: int) -> str:
    facts = {"the data": "b" if runtime.rank == odd else "a", "the configuration": "c"}
    try:
        check_same_on_all_ranks(runtime, facts)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_rank_that_sees_other_files_is_named(ranks):
    for message in ranks.run(4, differing, 2):
        assert message.startswith("the data is another on rank 2 than on the other 3;")
    assert ranks.run(4, differing, -1) == [""] * 4


def test_a_fingerprint_sees_another_file(tmp_path):
    data = tiny.pairs_data(tmp_path)
    prepare_data(data)
    before = data_fingerprint(data)
    assert data_fingerprint(data) == before
    lines = (tmp_path / "valid.tsv").read_text().splitlines()
    source, target = lines[3].split("\t")
    lines[3] = f"{target[::-1]}\t{source}"  # as many tokens, perhaps; not the same
    (tmp_path / "valid.tsv").write_text("\n".join(lines) + "\n")
    prepare_data(data)
    assert data_fingerprint(data) != before


def warned(runtime: Runtime, local_world_size: int) -> list[str]:
    messages: list[str] = []
    config = TrainConfig(
        model=scale_down(FAMILIES["decoder (Llama)"]), strategy=StrategyConfig(tensor=2)
    )
    with mock.patch.object(build.log, "warning", lambda text, *args: messages.append(text % args)):
        build.build_worker(config, replace(runtime, local_world_size=local_world_size))
    return messages


def test_layers_split_over_hosts_are_warned_about(ranks):
    assert ranks.run(2, warned, 2)[0] == []
    (message,) = ranks.run(2, warned, 1)[0]
    assert "strategy.tensor=2 is more than the 1 ranks of this host" in message
    assert "use strategy.tensor=1" in message


def asynchronous(runtime: Runtime) -> str:
    config = scale_down(FAMILIES["decoder (Llama)"])
    strategy = StrategyConfig(tensor=2, async_tensor=True)
    try:
        parallel_model(config, strategy, runtime, PRECISIONS["fp32"], compile=True)
    except ConfigError as error:
        return str(error)
    return ""


def test_asynchronous_collectives_want_their_hardware(ranks):
    for message in ranks.run(2, asynchronous):
        assert "needs NVIDIA GPUs" in message and "set strategy.async_tensor=false" in message
