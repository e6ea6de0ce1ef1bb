"""Every YAML file composes, every field is read, every bad value is answered with a good one."""

import ast
import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from conf import schema
from conf.validation.validate import fill_from_data, find_problems
from parallel.config_fields import facts_of
from parallel.errors import ConfigError
from parallel.strategy import AXES, StrategyConfig
from trainer.config.train import DataConfig, VerifyConfig
from trainer.data import READERS, DataFacts
from trainer.model import Transformer

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
DATA_OF_TOKENS = ["data=shakespeare", "data.kind=masked_text"]  # for encoders
DATA = {"decoder": "shakespeare", "encoder": "fashion-mnist", "encoder_decoder": "home-assistant"}
FACTS = {
    "text": DataFacts(vocab_size=1024),
    "images": DataFacts(classes=10, image_size=28, channels=1),
    "pairs": DataFacts(vocab_size=4096),
    "chat": DataFacts(vocab_size=2048),
    "speech": DataFacts(vocab_size=30, mels=40),
    "detection": DataFacts(classes=10, image_size=64, channels=1),
}
# Counted in transformers 5.23, in the class and config that each shape is named after.
PUBLISHED = {
    "gpt2": 124_439_808,
    "llama-1b": 1_235_814_400,
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
    "llama-405b": 405_853_388_800,
    "vit-b16": 86_567_656,
    "vit-l16": 304_326_632,
    "t5-base": 222_903_552,
    "bert-base": 109_514_298,
    "whisper-tiny": 37_184_640,  # that learn: not the encoder's positions
}


def configured(*overrides, name="train"):
    schema.register_schemas("now")
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return schema.build_config(name, compose(name, list(overrides)))


def options(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def found(*overrides, world_size=1, name="train"):
    return find_problems(configured(*overrides, name=name), world_size)


def count(model):
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(model, torch.float32).parameters())


@pytest.mark.parametrize("name", schema.SCHEMAS)
def test_door_composes(name):
    assert isinstance(configured(name=name), schema.SCHEMAS[name])
    assert found(name=name) == []


@pytest.mark.parametrize("strategy", options("strategy"))
def test_strategy_composes(strategy):
    world_size = 1 if strategy == "single" else 4
    assert found(f"strategy={strategy}", world_size=world_size) == []


@pytest.mark.parametrize("job", [f"experiment={e}" for e in options("experiment")])
@pytest.mark.parametrize("debug", [[], *([f"debug={d}"] for d in options("debug"))])
def test_job_composes_and_fits_its_data(job, debug):
    config = configured(job, *debug)
    assert find_problems(config, 1) == []
    model = fill_from_data(config, FACTS[config.data.kind]).model
    assert 0.35e6 < count(model) < 4.5e6


@pytest.mark.parametrize("model", options("model"))
def test_model_composes(model):
    config = configured(f"model={model}", "data.seq_len=64")
    of_inputs = {"tokens": DATA_OF_TOKENS, "audio": ["data=speech"]}
    data = of_inputs.get(config.model.inputs, [f"data={DATA[config.model.family]}"])
    data = ["data=fashion-canvas"] if config.model.outputs == "boxes" else data
    config = configured(f"model={model}", *data)
    assert find_problems(config, 1) == []
    if model in PUBLISHED:
        assert count(config.model) == PUBLISHED[model]


@pytest.mark.parametrize("data", options("data"))
def test_data_composes(data):
    config = configured(f"data={data}", "data.path=here")
    reader = READERS[config.data.kind]
    kinds = {"family": reader.families[0], "inputs": reader.inputs, "outputs": reader.outputs[0]}
    assert find_problems(replace(config, model=replace(config.model, **kinds)), 1) == []


def test_a_model_must_read_what_its_data_give():
    of_tokens = ("model=vit-tiny", "model.inputs=tokens", "data=fashion-mnist")
    (problem,) = found(*of_tokens)
    assert problem == (
        "model.inputs=tokens does not read data.kind=images, which gives patches; "
        "set model.inputs=patches, or choose other data"
    )


def test_each_kind_of_data_has_a_reader():
    fields = {field.name: field for field in dataclasses.fields(DataConfig)}
    assert list(facts_of(fields["kind"]).choices) == list(READERS)


def test_experiments_give_way_to_the_command_line():
    config = configured("experiment=images", "model=vit-b16", "optim.lr=0.5")
    assert (config.model.width, config.optim.lr, config.data.kind) == (768, 0.5, "images")


def test_values_round_trip():
    config = configured("strategy=fsdp", "optim.betas=[0.8,0.9]")
    assert schema.to_dataclass("train", OmegaConf.create(OmegaConf.to_yaml(config))) == config


def test_unknown_keys_are_refused():
    with pytest.raises(ConfigError, match=r"optim\.foo does not exist; remove \+optim\.foo"):
        configured("+optim.foo=1")


# The experiments' values are tuned from time to time; the messages below are about these.
SIZES = ["model.width=128", "model.heads=4", "model.kv_heads=2", "model.layers=4"]
SIZES += ["batch_size=16", "data.seq_len=256"]
BAD = {
    "precision=fp31": "precision=fp31 is not one of fp64, fp32, bf16, fp16, fp8, auto; "
    "did you mean fp32?",
    "model.activation=swigl": "did you mean swiglu?",
    "device=gpu": "device=gpu is not one of cpu, cuda, auto",
    "steps=-1": "steps=-1 must be at least 1",
    "optim.lr=nan": "optim.lr=nan must be above 0",
    "optim.lr=inf": "optim.lr=inf must be above 0",
    "model.dropout=1.0": "model.dropout=1.0 must be at least 0 and below 1",
    "optim.betas=[0.9,1.0]": "optim.betas=[0.9, 1.0] must be two numbers",
    "optim.betas=[0.9]": "optim.betas=[0.9] must be two numbers",
    "model.kv_heads=3": "model.kv_heads=3 does not divide model.heads=4; try 2 or 4",
    "model.heads=6": "model.heads=6 does not divide model.width=128; try 4 or 8",
    "model.head_width=15": "set model.head_width=16",
    "model.norm_placement=posts": "did you mean post?",
    "model.qk_norm=heads": "did you mean head?",
    "model.rope_type=ntk model.rope_scaling=2": "model.rope_type=ntk is not one of llama3, linear, "
    "dynamic, yarn",
    "model.rope_scaling=8 model.rope_slow_turns=4": "model.rope_type=llama3 blends frequencies "
    "between model.rope_slow_turns=4 and model.rope_fast_turns=4, which must be more; set "
    "model.rope_fast_turns=16",
    "model.rope_scaling=8 model.rope_type=yarn model.rope_theta=1": "set model.rope_theta=10000",
    "model.rope_scaling=8 model.rope_type=dynamic model.head_width=2": "set model.head_width=4",
    "compress=pool model.sliding_window=8": "model.sliding_window=8 does not count; set "
    "compress.pool_after=0, or model.sliding_window=0",
    "compress.prune_heads=0.5 model.qk_norm=width": "set compress.prune_heads=0",
    "batch_size=15": "batch_size=15 is not divisible by the 2 ranks that see different samples "
    "(strategy.replicate × strategy.shard); try 14 or 16",
    "batch_size=-3": "batch_size=-3 must be at least 1",
    "batch_size=1": "batch_size=1 is not divisible by the 2 ranks that see different samples "
    "(strategy.replicate × strategy.shard); try 2",
    "micro_batch_size=3": "micro_batch_size=3 does not divide the 8 samples of one rank "
    "(batch_size=16 / 2 ranks); try 2 or 4",
    "model.max_positions=100": "data.seq_len=256 is more than model.max_positions=100; "
    "set data.seq_len=100",
    "model=vit-tiny": "model.family=encoder learns from images, but data.kind=text",
    "data=text": "data.path is empty",
    "strategy=single": "choose strategy=ddp",
    "strategy.shard=3": "start 3 ranks (torchrun --nproc_per_node=N, or launch.ranks=N)",
    "strategy=hybrid": "the fixed degrees make 4, which does not divide 2 ranks; start 4 ranks",
    "strategy=context strategy.context_method=ulysses model.heads=3 model.width=96 "
    "model.kv_heads=0": "strategy.context=2 does not divide the 3 heads, which "
    "strategy.context_method=ulysses deals out; try strategy.context=1, 3, or",
    "strategy=context data.seq_len=3": "data.seq_len=3; set strategy.context=1 or less",
    "strategy=pipeline strategy.stages_per_rank=2": "strategy.stages_per_rank=2 must be exactly 1",
    "strategy=pipeline strategy.split=[5]": "strategy.split=[5] must be the first blocks of stages",
    "strategy=pipeline strategy.schedule=gpip": "did you mean gpipe?",
    "strategy=tensor strategy.async_tensor=true": "strategy.tensor=2 and compile=false; "
    "set compile=true",
    "metrics.timeline=true": "metrics.timeline=true draws a pipeline's schedule, but "
    "strategy.pipeline=1; set strategy=pipeline, or metrics.timeline=false",
    "strategy=tensor model.heads=3 model.width=96 model.kv_heads=0": "strategy.tensor=2 does not "
    "divide model.heads=3; try 1, 3",
    "strategy.reduce=int4": "strategy.reduce=int4 is not one of auto, fp32, bf16, fp16, int8, "
    "powersgd; did you mean int8?",
    "strategy.powersgd_rank=0": "strategy.powersgd_rank=0 must be at least 1",
    "strategy=fsdp strategy.reduce=powersgd": "strategy.reduce=powersgd compresses whole gradients "
    "of whole copies, which strategy.shard=2 does not leave; set strategy=ddp, or "
    "strategy.reduce=bf16",
    "strategy=tensor strategy.reduce=int8": "which strategy.tensor=2 does not leave",
    "strategy.reduce=int8 precision=fp16": "strategy.reduce=int8 adds to a step what was lost in "
    "the one before, but precision=fp16 scales each by another factor; set precision=bf16, or "
    "strategy.reduce=fp16",
    "strategy=pipeline model.layers=1": "strategy.pipeline=2 with 1 stages per rank needs 2 "
    "blocks, one for each stage, but the model has 1 (model.layers=1); set strategy.pipeline=1",
    "strategy=pipeline strategy.split=[4]": "strategy.split=[4] must be the first blocks of stages "
    "1 to 1: 1 rising numbers from 1 to 3, e.g. [2]",
    "strategy=pipeline strategy.split=[1,2]": "strategy.split=[1,2] must be the first blocks",
    "strategy=pipeline strategy.split=[0]": "strategy.split=[0] must be the first blocks",
    "strategy=pipeline strategy.schedule=zbv strategy.split=[2,1,3]": "e.g. [1,2,3]; or empty",
    "strategy=pipeline strategy.schedule=dualpipe": "did you mean dualpipev?",
    "strategy=pipeline strategy.stages_per_rank=2 strategy.schedule=1f1b": "stages_per_rank=2 "
    "must be exactly 1 for strategy.schedule=1f1b; set strategy.stages_per_rank=1",
    "strategy=pipeline strategy.schedule=dualpipev micro_batch_size=16": "takes at least 4 "
    "micro-batches, but there are 1",
    "strategy=pipeline strategy.schedule=zero_bubble batch_size=15 micro_batch_size=3": "takes 2 "
    "rounds of equally many micro-batches, but there are 5",
    "strategy=pipeline strategy.schedule_csv=none.csv": "strategy.schedule_csv=none.csv cannot be "
    "read",
    "strategy=pipeline strategy.schedule=zbv compile=true": "compile=true needs a backward in one "
    "pass, but strategy.schedule=zbv computes gradients of inputs and of weights apart; set "
    "compile=false, or strategy.schedule=gpipe or 1f1b or interleaved or looped_bfs",
    "strategy=pipeline strategy.schedule=zero_bubble precision=fp8": "set precision=bf16, or "
    "strategy.schedule=gpipe",
    "precision=fp8 model.ffn_width=344": "precision=fp8 multiplies matrices whose sizes are "
    "multiples of 16, but not those of model.ffn_width=344; set precision=bf16, or "
    "model.ffn_width=336 or 352",
    "strategy=tensor precision=fp8 model.ffn_width=336 model.width=104": "but not those of "
    "model.width=104 and the heads (2 × 26) and the key/value heads (1 × 26) and "
    "model.ffn_width=336 on each of strategy.tensor=2 ranks; set precision=bf16, or "
    "model.width=96 or 112 and model.head_width=16 or 32 and model.ffn_width=320 or 352",
    "precision=fp8 compress=int8 compress.bits=8": "precision=fp8 and compress.bits=8 both change "
    "how the same layers multiply; set precision=bf16, or compress.bits=0",
    "precision=fp8 compress.sparse_n=2": "precision=fp8 and compress.sparse_n=2 both change how "
    "the same layers multiply; set precision=bf16, or compress.sparse_n=0",
    "strategy=pipeline strategy.schedule=zero_bubble activation_checkpointing=block": "set "
    "activation_checkpointing=none, or strategy.schedule=gpipe",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_value_gets_its_message(override):
    messages = found(*SIZES, *override.split(" "), world_size=2)
    assert len(messages) == 1
    assert BAD[override] in messages[0]


def test_heads_that_a_tensor_degree_fits():
    many = ("model.width=512", "model.heads=16", "model.kv_heads=4", "strategy=tensor")
    for degree in (2, 4, 8, 16):  # from 8 on a key/value head is shared by ranks
        assert found(*SIZES, *many, f"strategy.tensor={degree}", world_size=degree) == []
    messages = found(*SIZES, *many, world_size=32)
    assert messages == [
        "strategy.tensor=32 does not divide model.heads=16 and model.kv_heads=4; try 1, 2, 4, 8, 16"
    ]
    odd = (*many, "model.heads=12", "model.kv_heads=6", "model.width=384")
    assert found(*SIZES, *odd, world_size=4)[0].endswith("try 1, 2, 3, 6, 12")


def test_a_pipelines_schedule_can_be_drawn():
    overrides = ("strategy=pipeline", "metrics.timeline=true")
    assert found(*SIZES, *overrides, world_size=2) == []


def test_what_compresses_needs_copies():
    for reduce in ("int8", "powersgd"):
        (message,) = found(f"strategy.reduce={reduce}")
        assert message == (
            f"strategy.reduce={reduce} compresses what copies tell each other, but "
            "strategy.replicate=1 makes none; start 2 ranks or more (torchrun --nproc_per_node=N, "
            "or launch.ranks=N), or set strategy.reduce=auto"
        )
        assert found(f"strategy.reduce={reduce}", world_size=2) == []
        # Hosts that are lost must not end a run.
        assert found(f"strategy.reduce={reduce}", "strategy.elastic=true") == []
    for reduce in ("fp32", "bf16", "fp16"):  # nothing is summed, and nothing rounded
        assert found(f"strategy.reduce={reduce}") == []
    (message,) = found("strategy.reduce=bf16", world_size=2, name="verify")
    assert message == (
        "strategy.reduce=bf16 rounds gradients, so that no layout equals one process; set "
        "strategy.reduce=auto"
    )


def test_a_fault_must_have_its_place():
    fault = VerifyConfig(fault="skip_output_sum")
    assert find_problems(fault, 1) == [
        "fault=skip_output_sum is one of split layers; set strategy=tensor"
    ]
    whole = StrategyConfig(tensor=2, sequence_parallel=False)
    assert find_problems(replace(fault, strategy=whole), 2) == []
    gather = VerifyConfig(fault="skip_sequence_gather", strategy=whole)
    assert "set strategy.sequence_parallel=true" in find_problems(gather, 2)[0]
    partial = VerifyConfig(fault="skip_partial_gradient_sum", strategy=whole)
    assert "set strategy.sequence_parallel=true" in find_problems(partial, 2)[0]
    assert find_problems(replace(partial, model=replace(partial.model, qk_norm="head")), 2) == []
    mean = VerifyConfig(fault="skip_norm_gradient_mean", strategy=whole)
    assert "set model.qk_norm=width" in find_problems(mean, 2)[0]
    ring = StrategyConfig(context=2, context_method="ring")
    step = VerifyConfig(fault="skip_ring_step", strategy=ring)
    assert find_problems(step, 2) == []
    for strategy in (replace(ring, context_method="all_gather"), StrategyConfig(replicate=2)):
        assert find_problems(replace(step, strategy=strategy), 2) == [
            "fault=skip_ring_step is one of a ring; set strategy=context "
            "strategy.context_method=ring"
        ]
    assert find_problems(VerifyConfig(fault="local_loss_scale"), 1) == [
        "fault=local_loss_scale is one of a pipeline; set strategy=pipeline"
    ]


def test_verify_takes_a_task_of_the_models_family():
    assert found("task=chat", name="verify") == []
    (message,) = found("task=pairs", name="verify")
    assert message == (
        "task=pairs needs model.family=encoder_decoder, but it is decoder; set task=auto"
    )


def test_the_rules_of_nccl_are_for_cpus():
    assert found("backend=nccl_like", name="verify") == []
    assert found("backend=nccl_like", "device=cuda", name="verify") == [
        "backend=nccl_like runs on CPUs, but device=cuda; set device=cpu"
    ]


@pytest.mark.parametrize("door", ["verify", "evaluate", "generate"])
def test_every_door_refuses_stages_that_a_schedule_does_not_take(door):
    keys = ["strategy=pipeline", "strategy.schedule=zbv", "strategy.stages_per_rank=3"]
    messages = found(*keys, *(["model.layers=6"] * (door == "verify")), world_size=2, name=door)
    assert len(messages) == 1
    assert messages[0].startswith("strategy.stages_per_rank=3 must be exactly 2")


def test_an_own_schedule_that_stands_still_or_splits_the_backward(tmp_path):
    path = tmp_path / "own.csv"
    keys = [*SIZES, "strategy=pipeline", "batch_size=2", "micro_batch_size=1"]
    keys += [f"strategy.schedule_csv={path}"]
    path.write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    assert found(*keys, "compile=true", world_size=2) == []
    path.write_text("0F0,0B0,0F1,0B1\n1F0,1F1,1B1,1B0\n")
    assert found(*keys, world_size=2) == [
        f"strategy.schedule_csv={path}: the schedule cannot go on (deadlock): rank 0 at 0B0 waits "
        "for 1B0 of rank 1; rank 1 at 1F1 waits for 0F1 of rank 0"
    ]
    path.write_text("0F0,0F1,0B0,0B1\n1F0,1I0,1F1,1B1,1W0\n")
    assert found(*keys, world_size=2) == []
    assert found(*keys, "compile=true", world_size=2) == [
        f"compile=true needs a backward in one pass, but strategy.schedule_csv={path} computes "
        "gradients of inputs and of weights apart; set compile=false, or write B for I and W there"
    ]


def test_image_size_must_be_whole_patches():
    messages = found("experiment=images", "model.image_size=28", "model.patch_size=5")
    assert messages == ["model.patch_size=5 does not divide model.image_size=28; try 4 or 7"]
    with pytest.raises(ConfigError) as raised:
        fill_from_data(configured("experiment=images", "model.patch_size=5"), FACTS["images"])
    assert raised.value.problems == messages


def test_an_image_has_no_seq_len():
    assert found("experiment=images", "model.max_positions=50") == []


def test_all_problems_at_once():
    keys = ["precision=fp31", "steps=0", "optim.lr=-1", "model.kv_heads=3", "batch_size=5"]
    messages = found(*SIZES, *keys, "strategy=hsdp", world_size=4)
    assert len(messages) == len(keys)
    for key, message in zip(sorted(keys), sorted(messages), strict=True):
        assert message.startswith(key)


def test_sizes_left_open_follow_the_data():
    text = fill_from_data(configured("data.seq_len=99"), FACTS["text"]).model
    assert (text.vocab_size, text.max_positions) == (1024, 99)
    images = fill_from_data(configured("experiment=images"), FACTS["images"]).model
    assert (images.image_size, images.channels, images.classes) == (28, 1, 10)
    padded = fill_from_data(configured("model.vocab_size=1088"), FACTS["text"]).model
    assert padded.vocab_size == 1088


def test_sizes_that_clash_with_the_data():
    with pytest.raises(ConfigError, match=r"model\.vocab_size=1000 .* token ids from 1000 on"):
        fill_from_data(configured("model.vocab_size=1000"), FACTS["text"])
    with pytest.raises(ConfigError) as raised:
        fill_from_data(configured("experiment=images", "model=vit-b16"), FACTS["images"])
    assert raised.value.problems == [
        "model.image_size=224, but the data's is 28; set model.image_size=0",
        "model.channels=3, but the data's is 1; set model.channels=0",
    ]
    with pytest.raises(ConfigError, match=r"model\.classes=9 is less than the data's 10"):
        fill_from_data(configured("experiment=images", "model.classes=9"), FACTS["images"])


def test_every_field_has_a_reader():
    read = set(AXES)
    for package in ("trainer", "parallel", "launch"):
        for path in (ROOT / package).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            read |= {
                node.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
            }
    keys = {key for door in schema.SCHEMAS.values() for key in schema.known_keys(door)}
    assert {key for key in keys if key.rsplit(".", 1)[-1] not in read} == set()
