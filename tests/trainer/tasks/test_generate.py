"""Compare generation with forwards without a cache, exhaustive search and transformers."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers import TopKLogitsWarper, TopPLogitsWarper

from parallel.strategy import StrategyConfig, world_size
from trainer.config.train import CompressConfig, GenerateConfig, UserError
from trainer.data import open_split, open_tokenizer
from trainer.inference.beam_search import translate_tokens
from trainer.inference.sampling import filter_logits, sample_token, sample_tokens
from trainer.inference.trained_run import load_trained_run
from trainer.tasks import generate as module
from trainer.tasks.generate import print_generation
from trainer.tasks.image_classification import read_image

PROMPT = [3, 1, 4, 1, 5]
IMAGES = replace(tiny.CLASSIFIER, image_size=8, channels=1, classes=7, max_positions=5)
NO_END = -1  # an id that no model generates
BOS = EOS = 0
PAD = 1
# The translations of the first six end early, at several lengths: ranks must wait for each other.
SOURCES = [
    [19, 3],
    [4, 16, 15],
    [17, 14, 17, 22, 7, 10],
    [19, 16, 17],
    [13, 12, 16, 1, 16],
    [18, 7, 17, 14, 16],
    [7],
    [18, 8, 13, 17, 12],
    [8, 19, 4],
    [22, 12, 3, 15, 22, 17],
    [1, 1, 1],
    [12, 15, 9, 22, 18],
]


def greedy(worker, tokens):
    """Return the most probable next token, by a forward without a cache."""
    with worker.evaluation_mode():
        return int(worker.model({"tokens": torch.tensor([tokens])})[0, -1].argmax())


@pytest.mark.parametrize("model", [tiny.LLAMA, tiny.GPT])
@pytest.mark.parametrize("prompt", [PROMPT, []])
def test_cached_text_equals_forwards_without_a_cache(runtime, model, prompt):
    worker = tiny.make_worker(runtime, model)
    expected = prompt or [7]  # an empty prompt is the start of a document
    length = len(expected)
    for _ in range(10):
        expected = [*expected, greedy(worker, expected)]
    written = sample_tokens(worker, prompt, max_tokens=10, eot_id=7, temperature=0.0)
    end = expected.index(7, length) if 7 in expected[length:] else None
    assert written == expected[length:end]
    assert len(set(written)) > 3


@pytest.mark.parametrize("model", [tiny.LLAMA, tiny.GPT])
def test_text_beyond_the_positions_continues_from_the_newer_half(runtime, model):
    worker = tiny.make_worker(runtime, model)
    prompt = [(7 * i) % 23 for i in range(20)]
    history, window = list(prompt), prompt[-16:]
    for _ in range(20):
        token = greedy(worker, window)
        history.append(token)
        window = [*window, token] if len(window) < 16 else history[-8:]
    written = sample_tokens(worker, prompt, max_tokens=20, eot_id=NO_END, temperature=0.0)
    assert written == history[20:]


def test_text_without_a_limit_of_positions(runtime):
    worker = tiny.make_worker(runtime, replace(tiny.LLAMA, max_positions=0))
    expected = list(PROMPT)
    for _ in range(20):
        expected.append(greedy(worker, expected))
    written = sample_tokens(worker, PROMPT, max_tokens=20, eot_id=NO_END, temperature=0.0)
    assert written == expected[len(PROMPT) :]


def test_text_ends_before_the_end_token(runtime):
    worker = tiny.make_worker(runtime, tiny.LLAMA)
    written = sample_tokens(worker, PROMPT, max_tokens=10, eot_id=NO_END, temperature=0.0)
    end = next(i for i in range(2, 10) if written[i] not in written[:i])
    ended = sample_tokens(worker, PROMPT, max_tokens=10, eot_id=written[end], temperature=0.0)
    assert ended == written[:end]


def test_the_seed_decides_the_text(runtime):
    worker = tiny.make_worker(runtime, tiny.LLAMA)
    texts = [
        sample_tokens(worker, PROMPT, max_tokens=10, eot_id=NO_END, temperature=2.0, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert worker.model.training  # the mode is restored


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.7), (3, 1.0), (40, 0.3), (6, 0.6), (0, 1e-9)])
def test_top_k_and_top_p_keep_what_transformers_keep(top_k, top_p):
    logits_RV = 3 * torch.randn(50, 40, generator=torch.Generator().manual_seed(0)).double()
    expected_RV = TopKLogitsWarper(top_k)(None, logits_RV) if top_k else logits_RV
    expected_RV = TopPLogitsWarper(top_p)(None, expected_RV) if top_p < 1.0 else expected_RV
    for logits_V, expected_V in zip(logits_RV, expected_RV, strict=True):
        assert torch.equal(filter_logits(logits_V, top_k, top_p), expected_V)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_probabilities_at_the_temperature(temperature):
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    tokens = [sample_token(logits_V, temperature, 0, 1.0, generator) for _ in range(4000)]
    share_V = torch.bincount(torch.tensor(tokens), minlength=4) / 4000
    assert (share_V - (logits_V / temperature).softmax(-1)).abs().max() < 0.03


def padded(sources):
    longest = max(map(len, sources))
    source_BT = torch.tensor([ids + [PAD] * (longest - len(ids)) for ids in sources])
    valid_BT = torch.tensor([[i < len(ids) for i in range(longest)] for ids in sources])
    return source_BT, valid_BT


def ours(worker, sources, **options):
    options = {"max_tokens": 10, "bos_id": BOS, "end_ids": [EOS], **options}
    return translate_tokens(worker, *padded(sources), **options)


def log_probabilities(worker, source, *translations):
    """Return logits (N,S,V) of N translations of one sentence, without padding or cache."""
    inputs = {
        "source": torch.tensor([source] * len(translations)),
        "tokens": torch.tensor([[BOS, *tokens] for tokens in translations]),
    }
    with worker.evaluation_mode():
        return worker.model(inputs).log_softmax(-1)


def test_greedy_translation_of_a_padded_batch_equals_each_sentence_alone(runtime):
    worker = tiny.make_worker(runtime, tiny.TRANSLATOR)
    expected = []
    for source in SOURCES:
        tokens = []
        while len(tokens) < 10:
            token = int(log_probabilities(worker, source, tokens)[0, -1].argmax())
            if token == EOS:
                break
            tokens.append(token)
        expected.append(tokens)
    assert ours(worker, SOURCES) == expected
    assert {len(tokens) for tokens in expected} > {0, 1, 2, 10}
    assert ours(worker, SOURCES, max_tokens=99) == ours(worker, SOURCES, max_tokens=16)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_as_many_beams_as_sentences_find_the_best_of_all(runtime, penalty):
    worker = tiny.make_worker(runtime, replace(tiny.TRANSLATOR, vocab_size=5), seed=1)
    sources = [[1, 2, 3], [4], [3, 3, 1, 2, 2], [2, 4]]
    expected = []
    for source in sources:
        scores = {}
        longest = list(itertools.product(range(1, 5), repeat=3))
        for row, step_SV in zip(longest, log_probabilities(worker, source, *longest), strict=True):
            for length in range(4):  # the end token is the fourth at the latest
                steps = enumerate([*row[:length], EOS])
                total = sum(step_SV[i, token].item() for i, token in steps)
                scores[row[:length]] = total / (length + 1) ** penalty
        expected.append(list(max(scores, key=scores.get)))
    options = {"max_tokens": 4, "length_penalty": penalty}
    assert ours(worker, sources, beams=100, **options) == expected
    assert ours(worker, sources, beams=1, **options) != expected


def plain_beam_search(worker, source, beams, penalty, max_tokens):
    """Beam search on Python lists, one sentence; stops early only with K finished ones."""
    alive, finished = [(0.0, [])], []
    for _ in range(max_tokens):
        candidates = []
        for total, tokens in alive:
            step_V = log_probabilities(worker, source, tokens)[0, -1].tolist()
            candidates += [(total + step, [*tokens, token]) for token, step in enumerate(step_V)]
        candidates.sort(reverse=True)
        finished += [
            (total / len(tokens) ** penalty, tokens[:-1])
            for total, tokens in candidates[:beams]
            if tokens[-1] == EOS
        ]
        alive = [(total, tokens) for total, tokens in candidates if tokens[-1] != EOS][:beams]
        if len(finished) >= beams:
            break
    return max(finished)[1] if finished else alive[0][1]


@pytest.mark.parametrize(("beams", "penalty"), [(2, 1.0), (4, 0.6), (3, 0.0)])
def test_batched_beams_equal_a_plain_beam_search(runtime, beams, penalty):
    # With so few tokens the end token is often among the best candidates.
    worker = tiny.make_worker(runtime, replace(tiny.TRANSLATOR, vocab_size=7), seed=2)
    sources = [[1 + token % 6 for token in source] for source in SOURCES]
    expected = [plain_beam_search(worker, source, beams, penalty, 8) for source in sources]
    found = ours(worker, sources, beams=beams, length_penalty=penalty, max_tokens=8)
    assert found == expected
    assert found != ours(worker, sources, max_tokens=8)


def use_everywhere(runtime, strategy, layers=2):
    """Return texts, translations and classes of one rank; each rank has its own sentences."""
    writer, translator, classifier = (
        tiny.make_worker(runtime, replace(model, layers=layers), strategy)
        for model in (tiny.LLAMA, tiny.TRANSLATOR, IMAGES)
    )
    pooling = CompressConfig(pool_after=1, pool_stride=3)
    pooled = tiny.make_worker(runtime, replace(tiny.LLAMA, layers=4), strategy, compress=pooling)
    text = [
        sample_tokens(each, PROMPT, max_tokens=20, eot_id=NO_END, top_p=0.9, seed=5)
        for each in (writer, pooled)
    ]
    share = len(SOURCES) // translator.data_degree
    own = SOURCES[translator.data_rank * share :][:share]
    with classifier.evaluation_mode():
        images = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        classes = classifier.forward({"images": images.double()}).argsort(-1).tolist()
    return text, classes, ours(translator, own), ours(translator, own, beams=3)


@pytest.mark.parametrize(
    "strategy",
    [
        StrategyConfig(shard=2),
        StrategyConfig(shard=2, reshard_after_forward=False),
        StrategyConfig(replicate=2),
        StrategyConfig(replicate=3),
        StrategyConfig(tensor=4),
        StrategyConfig(replicate=2, tensor=2),
        StrategyConfig(pipeline=2),
        StrategyConfig(pipeline=2, schedule="interleaved"),
        StrategyConfig(pipeline=2, schedule="zbv"),
        StrategyConfig(pipeline=4, schedule="1f1b"),
        StrategyConfig(shard=2, pipeline=2),
        StrategyConfig(tensor=2, pipeline=2),
    ],
)
def test_any_layout_generates_the_same(ranks, runtime, strategy):
    layers = 4 if strategy.pipeline > 1 else 2
    text, classes, greedy_ids, beam_ids = use_everywhere(runtime, StrategyConfig(), layers)
    found = ranks.run(world_size(strategy), use_everywhere, strategy, layers)
    assert [rank[:2] for rank in found] == [(text, classes)] * len(found)
    # The ranks of a pipeline, its axis the outermost, and those that split a layer, the innermost,
    # have the same sentences.
    size = len(found) // strategy.pipeline
    for stage in (found[i : i + size : strategy.tensor] for i in range(0, len(found), size)):
        assert [ids for rank in stage for ids in rank[2]] == greedy_ids
        assert [ids for rank in stage for ids in rank[3]] == beam_ids


def answer(capsys, runtime, run, prompt, **options):
    config = GenerateConfig(run_dir=run.run_dir, prompt=prompt, precision="fp64", device="cpu")
    print_generation(replace(config, **options), runtime)
    return capsys.readouterr().out


def test_the_generate_command_continues_a_text(tmp_path, capsys, runtime):
    model = replace(tiny.LLAMA, vocab_size=0)
    run = tiny.make_run(tmp_path, runtime, model, tiny.text_data(tmp_path))
    tokenizer = open_tokenizer(run.data)
    worker = tiny.make_worker(runtime, run.model)
    prompt_ids = tokenizer.encode("abc [bold]")
    written = sample_tokens(
        worker, prompt_ids, max_tokens=9, eot_id=tokenizer.eot_id, temperature=0.0
    )
    shown = answer(capsys, runtime, run, "abc [bold]", max_tokens=9, temperature=0.0)
    assert shown == tokenizer.decode([*prompt_ids, *written]) + "\n"
    assert shown.startswith("abc [bold]") and len(shown) > len("abc [bold]\n")
    assert answer(capsys, runtime, run, "", max_tokens=9).strip()


def test_the_generate_command_translates_line_by_line(tmp_path, capsys, runtime):
    model = replace(tiny.TRANSLATOR, vocab_size=0)
    run = tiny.make_run(tmp_path, runtime, model, tiny.pairs_data(tmp_path))
    tokenizer = open_tokenizer(run.data)
    worker = tiny.make_worker(runtime, run.model)
    lines = ["abc", "defg gab fed"]
    options = {"bos_id": tokenizer.eot_id, "end_ids": [tokenizer.eot_id], "beams": 2}
    expected = [
        translate_tokens(worker, torch.tensor([tokenizer.encode(line)]), max_tokens=12, **options)[
            0
        ]
        for line in lines
    ]
    shown = answer(capsys, runtime, run, "\n".join(lines), max_tokens=12, beams=2)
    assert shown == "".join(tokenizer.decode(ids) + "\n" for ids in expected)
    with pytest.raises(UserError, match="prompt is empty"):
        answer(capsys, runtime, run, " ")


def test_the_generate_command_classifies_files_and_samples(tmp_path, capsys, runtime):
    run = tiny.make_run(tmp_path, runtime, tiny.CLASSIFIER, tiny.image_data(tmp_path))
    with np.load(run.data.path) as arrays:
        pixels = arrays["x_test"][3]
    np.save(tmp_path / "image.npy", pixels)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    batch = open_split(run.data, "test")
    batch = batch.collate([batch.sample(3, None)])
    worker = tiny.make_worker(runtime, run.model)
    with worker.evaluation_mode():
        share_V = worker.model({"images": torch.from_numpy(batch["images"])})[0].softmax(-1)
    shares, classes = share_V.topk(5)
    for prompt in ("test:3", str(tmp_path / "image.npy"), str(tmp_path / "image.png")):
        shown = answer(capsys, runtime, run, prompt)
        rows = [line for line in shown.splitlines() if "%" in line]
        assert len(rows) == 5
        for row, share, index in zip(rows, shares.tolist(), classes.tolist(), strict=True):
            assert f"kind {index} " in row and f"{share:.1%}" in row
    assert "labelled kind 3" in answer(capsys, runtime, run, "test:3")
    with pytest.raises(UserError, match="the last is test:10"):
        answer(capsys, runtime, run, "test:11")


@pytest.mark.parametrize(
    ("name", "message"),
    [("", "prompt is empty"), ("none.png", "No such file"), ("wide.npy", r"\(8, 9, 1\)")],
)
def test_a_prompt_that_is_not_an_image_is_one_message(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    np.save("wide.npy", np.zeros((8, 9), np.uint8))
    with pytest.raises(UserError, match=message):
        read_image(name, 8, 1)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_logits_are_an_error(temperature, bad):
    logits_V = torch.tensor([0.1, bad, -torch.inf])
    with pytest.raises(UserError, match="logits are not finite"):
        sample_token(logits_V, temperature, 0, 1.0, torch.Generator())
    assert (
        sample_token(torch.tensor([0.1, -torch.inf]), temperature, 0, 1.0, torch.Generator()) == 0
    )


@pytest.mark.parametrize("task", ["translation", "classification"])
def test_a_diverged_model_generates_nothing(tmp_path, capsys, runtime, monkeypatch, task):
    if task == "translation":
        model, data = replace(tiny.TRANSLATOR, vocab_size=0), tiny.pairs_data(tmp_path)
    else:
        model, data = tiny.CLASSIFIER, tiny.image_data(tmp_path)
    run = tiny.make_run(tmp_path, runtime, model, data)

    def diverged(config, runtime):
        opened = load_trained_run(config, runtime)
        next(iter(opened.worker.parameters().values())).data.fill_(torch.nan)
        return opened

    monkeypatch.setattr(module, "load_trained_run", diverged)
    with pytest.raises(UserError, match="logits are not finite"):
        answer(capsys, runtime, run, "abc" if task == "translation" else "test:3")
