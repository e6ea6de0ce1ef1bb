"""The door of plans as a user meets it: no data, words to paste, one message for a mistake."""

import json
import re

import pytest
import yaml
from forked import ROOT, call_in_fork, run_script
from hydra import compose, initialize_config_dir

from conf import schema
from conf.validation.validate import find_problems
from launch.cli.plan_text import layout_words
from parallel.strategy import resolve_degrees
from trainer.config.hardware import ACCELERATORS
from trainer.plan.layout import Layout, layout_of

PLAN = str(ROOT / "launch" / "plan.py")
SMALL = ["model=llama-1b", "data.seq_len=1024", "batch_size=16", "cluster=l40s"]


@pytest.fixture
def plan(tmp_path):
    def run(*words, trace="false"):
        output, words = tmp_path / "output.txt", [*words, f"plan.trace={trace}"]
        status = call_in_fork(300.0, run_script, [PLAN, *words], tmp_path, output)
        text = output.read_text()
        output.unlink()
        return status, text

    return run


def composed(words):
    schema.register_schemas("now")
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        return schema.build_config("train", compose("train", words))


@pytest.mark.parametrize(
    "layout",
    [
        Layout(shard=8, micro_batch=2),
        Layout(replicate=4, shard=2, recomputed="selective"),
        Layout(replicate=8, chunks=8),
        Layout(replicate=2, tensor=4),
        Layout(tensor=8),
        Layout(shard=2, context=2, tensor=2, context_method="ring"),
        Layout(pipeline=2, shard=4, schedule="interleaved", stages_per_rank=4),
        Layout(pipeline=2, replicate=4, schedule="1f1b"),
        Layout(),
    ],
)
def test_the_words_make_the_layout(layout):
    config = composed([*layout_words(layout).split(), "batch_size=64"])
    strategy = resolve_degrees(config.strategy, layout.ranks)
    mode, chunks = config.activation_checkpointing, config.loss.chunks
    assert layout_of(strategy, config.micro_batch_size, mode, chunks) == layout


def test_a_plan_is_printed_and_written_and_its_words_are_sound(plan, tmp_path):
    few = ["cluster.nodes=1", "strategy.context=1", "plan.top=3"]
    status, text = plan(*SMALL, *few, "json=plan.json", "tokens=1e9")
    assert status == 0, text
    assert "times ±" in text and "not calibrated" in text
    assert "no step of a L40S was fitted to" in " ".join(text.split())
    values = json.loads((tmp_path / "plan.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.html", "plan.json"]
    (made,) = values["plans"]
    assert made["legal"] >= made["fitting"] > 0
    for layout in [made["proposed"], *made["fastest"]]:
        assert layout["words"] in text
        assert layout["step_seconds"] == pytest.approx(sum(layout["step_terms"].values()))
        assert layout["memory_bytes"] == pytest.approx(sum(layout["memory_terms"].values()))
        words = [*layout["words"].split(), "model=llama-1b", "data.seq_len=1024", "batch_size=16"]
        assert find_problems(composed(words), 8) == []
    page = (tmp_path / "plan.html").read_text()
    assert page.count('class="point"') > 10 and 'class="limit"' in page
    hours = made["proposed"]["step_seconds"] * 1e9 / (16 * 1024) / 3600 * 8
    assert made["proposed"]["device_hours"] == pytest.approx(hours)


def test_a_named_strategy_is_told_term_by_term(plan):
    words = ["strategy=pipeline", "strategy.schedule=1f1b", "cluster.nodes=1"]
    status, text = plan(*SMALL, *words)
    assert status == 0, text
    assert re.search(r"^step: .*products .*bubble", text, re.MULTILINE)
    assert re.search(r"^memory, pipeline rank \d: .*reserve", text, re.MULTILINE)
    assert len(re.findall(r"^ +\d+ +[\d.]+ +[\d.e-]+ ", text, re.MULTILINE)) == 8


TINY = ["data=fashion-mnist", "model=vit-tiny", "batch_size=64", "cluster=l40s"]


def test_the_layout_is_traced_behind_its_plan_unless_turned_off(plan):
    words = [*TINY, "strategy=ddp", "cluster.nodes=1"]  # bundled data say the classes
    status, without = plan(*words)
    assert status == 0 and "traced" not in without, without
    status, text = plan(*words, trace="true")
    assert status == 0 and text.startswith(without.rstrip()[:200]), text
    assert re.search(r"^traced, rank 0: .* GiB = [\d.]+ GiB$", text, re.MULTILINE), text
    assert "replicate all_reduce" in text


BAD = {
    "cluster=h1000": "cluster=h1000 does not exist; .*; did you mean cluster=h100?",
    "cluster.gpu=h1000": "cluster.gpu=h1000 is not one of .*; did you mean h100?",
    "strategy.tensor=3": "strategy.tensor=3: the fixed degrees make 3, which does not divide 8",
    "strategy=fsdp strategy.shard=3": "8 ranks were started but strategy.shard=3 uses 3",
    "model=llama-70b": "fits on no layout of 8 × L40S; the least .*cluster.nodes=",
    "precision=fp64": "precision=fp64 has no peak on cluster.gpu=l40s",
    "batch_size=3 strategy.pipeline=1 strategy.tensor=1 strategy.context=1": "batch_size=3 is not "
    "divisible by the 8 ranks",
}


@pytest.mark.parametrize("words", BAD)
def test_a_mistake_gets_one_message_and_nothing_is_written(plan, tmp_path, words):
    keys = {word.partition("=")[0] for word in words.split()}
    small = [word for word in SMALL if word.partition("=")[0] not in keys]
    status, text = plan(*small, "cluster.nodes=1", "json=plan.json", *words.split())
    assert status == 2, text
    assert re.search(BAD[words].replace("?", r"\?"), text), text
    assert "Traceback" not in text
    assert list(tmp_path.iterdir()) == []


def test_each_accelerator_has_a_cluster():
    for name, device in ACCELERATORS.items():
        values = yaml.safe_load((ROOT / "conf" / "cluster" / f"{name}.yaml").read_text())
        assert (values["gpu"], values["gpus_per_node"]) == (name, device.per_host)
