"""Answers: a cache that is kept from turn to turn, every end token, a conversation in a pipe."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import chats
import pytest
import tiny
import torch

from launch.cli.preflight import check_trained_run
from parallel.strategy import StrategyConfig, world_size
from trainer.config.train import DataConfig, GenerateConfig, UserError, VerifyConfig
from trainer.data import data_fingerprint, open_split, open_tokenizer, prepare_data
from trainer.data.record import data_of
from trainer.data.tokenizer import Tokenizer
from trainer.inference.beam_search import BeamSearch, translate_tokens
from trainer.inference.conversation import Dialogue
from trainer.inference.sampling import Sampling, sample_tokens
from trainer.inference.trained_run import load_trained_run
from trainer.model import DecodingCache
from trainer.tasks.chat import Chat
from trainer.tasks.generate import print_generation
from trainer.verify.cases import CHAT_STRATEGIES, FAMILIES, STRATEGIES
from trainer.verify.compare import compare_layout, format_verdict

MODEL = replace(tiny.LLAMA, vocab_size=312, max_positions=300, dropout=0.0)
QUESTIONS = ["How are you?", "and  now <|im_end|>", "日本"]


@pytest.mark.parametrize("strategy", CHAT_STRATEGIES)
def test_packed_conversations_equal_one_process(ranks, strategy):
    strategy = STRATEGIES[strategy]
    config = VerifyConfig(strategy, FAMILIES["decoder (Llama)"], steps=2, task="chat")
    found = ranks.run(world_size(strategy), compare_layout, config)[0]
    assert format_verdict(found, 1e-10) == "equal"


def test_a_random_batch_is_packed_with_unequal_targets():
    batch = Chat().random_batch(MODEL, 8, 12, torch.Generator().manual_seed(0))
    valid = (batch["targets"] >= 0).sum(1)
    assert valid.max() > valid.min() == 0
    documents, positions = batch["documents"], batch["positions"]
    assert documents.max() == 2
    new = torch.diff(documents, dim=1) > 0
    assert (positions[:, 0] == 0).all() and (positions[:, 1:][new] == 0).all()
    assert (torch.diff(positions, dim=1)[~new] == 1).all()


WINDOWED = replace(tiny.LLAMA, sliding_window=3, full_attention_every=2)


@pytest.mark.parametrize("model", [tiny.LLAMA, tiny.GPT, WINDOWED])
def test_several_tokens_after_a_cache_equal_one_forward(runtime, model):
    worker = tiny.make_worker(runtime, model)
    tokens = torch.randint(0, 23, (1, 12), generator=torch.Generator().manual_seed(0))
    with worker.evaluation_mode():
        expected = worker.forward({"tokens": tokens})
        cache = DecodingCache(worker.model, 12)
        parts = [worker.forward({"tokens": part}, cache) for part in tokens.split([4, 5, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-12)


def dialogue(runtime, folder, strategy=None, **sampling):
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    model = replace(MODEL, vocab_size=tokenizer.vocab_size)
    return Dialogue(tiny.make_worker(runtime, model, strategy), tokenizer, Sampling(**sampling))


def talk(runtime, folder, strategy=None):
    held = dialogue(runtime, folder, strategy, temperature=0.0)
    return ["".join(held.answer(question, 12)) for question in QUESTIONS]


@pytest.mark.parametrize("kind", [chats.byte_level, chats.sentence_piece])
def test_turns_with_a_kept_cache_equal_fresh_forwards(runtime, tmp_path, kind):
    held = dialogue(runtime, kind(tmp_path), temperature=0.0)
    for question in QUESTIONS:
        answer = "".join(held.answer(question, 12))
        fresh = dialogue(runtime, tmp_path, temperature=0.0)
        assert "".join(fresh.answer_to(held.messages[:-1], 12)) == answer
        assert held.messages[-1] == {"role": "assistant", "content": answer}
    assert len(held._cached) > 60  # the turns before are in it
    read = held._reuse_cache([*held._cached, 5], 1, 300)
    assert read == [5]


STRATEGY = {"tensor": StrategyConfig(tensor=2), "pipeline": StrategyConfig(pipeline=2)}


@pytest.mark.parametrize("strategy", STRATEGY.values(), ids=STRATEGY)
def test_layouts_answer_alike(ranks, runtime, tmp_path, strategy):
    chats.byte_level(tmp_path)
    expected = talk(runtime, tmp_path)
    assert ranks.run(2, talk, tmp_path, strategy) == [expected] * 2
    assert len(set(expected)) > 1


def test_generation_stops_at_any_end(runtime, tmp_path):
    worker = tiny.make_worker(runtime, tiny.LLAMA)
    options = {"max_tokens": 10, "eot_id": -1, "temperature": 0.0}
    written = sample_tokens(worker, [3, 1, 4], **options)
    end = next(i for i in range(2, 10) if written[i] not in written[:i])
    assert sample_tokens(worker, [3, 1, 4], **options, end_ids=[99, written[end]]) == written[:end]

    folder = chats.byte_level(tmp_path)
    whole = dialogue(runtime, folder, temperature=0.0)
    list(whole.answer("How are you?", 12))
    asked = len(whole._template.encode(whole.messages[:1], add_generation_prompt=True))
    generated = whole._cached[asked:]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, generated[3]]}))
    short = dialogue(runtime, folder, temperature=0.0)
    list(short.answer("How are you?", 12))
    assert short._cached[asked:] == generated[: generated.index(generated[3])]


def test_beams_stop_at_any_end(runtime):
    worker = tiny.make_worker(runtime, tiny.TRANSLATOR)
    source = torch.tensor([[19, 3, 5], [4, 16, 15]])
    options = {"max_tokens": 8, "bos_id": 0}
    found = translate_tokens(worker, source, end_ids=[22], **options, beams=1)
    ends = {found[0][2], 22}
    for beams in (1, 3):
        two = translate_tokens(worker, source, end_ids=[22, *sorted(ends)], **options, beams=beams)
        assert not ends & {token for sentence in two for token in sentence}
    greedy = translate_tokens(worker, source, end_ids=[22, *sorted(ends)], **options, beams=1)
    assert greedy[0] == found[0][: found[0].index(found[0][2])]


def test_beams_go_on_beside_several_ends():
    search = BeamSearch(1, 2, 8, 1.0, [0, 1, 2], torch.device("cpu"))
    search.advance(torch.tensor([[9.0, 8.0, 7.0, 2.0, 1.0, 0.0]]).expand(2, -1))
    assert search.last_tokens().flatten().tolist() == [3, 4]
    assert search._total_BK.isfinite().all()


@pytest.fixture(scope="module")
def run(tmp_path_factory, runtime):
    folder = tmp_path_factory.mktemp("chat")
    (folder / "data").mkdir()
    for split in ("train", "valid", "test"):
        lines = [{"prompt": f"say {i}", "completion": f"{i} {i}"} for i in range(8)]
        path = folder / "data" / f"{split}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = DataConfig(
        kind="chat",
        path=str(folder / "data"),
        tokenizer=str(chats.byte_level(folder / "tokenizer")),
        seq_len=48,
        cache=str(folder / "cache"),
    )
    return tiny.make_run(folder, runtime, replace(MODEL, vocab_size=0), data)


def fresh_answer(run, runtime, question):
    asked = GenerateConfig(run.run_dir, precision="fp64", temperature=0.0, max_tokens=5)
    loaded = load_trained_run(replace(asked, prompt=question), runtime)
    return Chat().generate(replace(asked, prompt=question), loaded) + "\n"


def test_a_conversation_in_a_pipe(run, runtime, monkeypatch, capsys):
    asked = GenerateConfig(run.run_dir, chat=True, precision="fp64", temperature=0.0, max_tokens=5)
    too_long = "again " * 400
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"say 1\n\n{too_long}\nsay 2\n"))
    print_generation(check_trained_run(asked, 1), runtime)
    said = capsys.readouterr().out
    first, _, third = said.partition("the conversation has ")
    assert third.endswith("begins a new one\n" + fresh_answer(run, runtime, "say 2"))
    assert "tokens, and the model model.max_positions=300; the next message" in third
    assert first == fresh_answer(run, runtime, "say 1")
    assert (Path(run.run_dir) / "chat_template.jinja").read_text() == chats.CHATML


def test_what_no_conversation_can_be_held_with(run, tmp_path):
    asked = GenerateConfig(run.run_dir, chat=True, prompt="hi")
    asked.launch.ranks = 2
    with pytest.raises(UserError, match="prompt is for chat=false") as raised:
        check_trained_run(asked, 1)
    assert "torchrun --nproc_per_node=2" in str(raised.value)


def test_a_run_finds_its_tokens_by_its_own_folder(run):
    """The template, the tokenizer and what lies beside it are copies: nothing is prepared anew."""
    before = set(Path(run.data.cache).iterdir())
    assert data_fingerprint(data_of(run)) == data_fingerprint(run.data)
    prepare_data(data_of(run))
    assert set(Path(run.data.cache).iterdir()) == before


def test_a_run_shows_answers(run, runtime):
    worker = tiny.make_worker(runtime, run.model)
    shown = Chat().sample_output(
        worker,
        lambda: open_tokenizer(data_of(run)),
        lambda split: open_split(data_of(run), split),
        4,
        0,
    )
    assert shown.startswith("> say ")
