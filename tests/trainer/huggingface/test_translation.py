"""Imported translators generate what transformers generates, from their own first tokens."""

import pytest
import tiny
import torch
from reference_models import build_reference, float64_for_float32
from test_architectures import CASES

from trainer.huggingface.weights import WeightReader
from trainer.inference.beam_search import translate_tokens

EOS = 2
LENGTH = 9


@pytest.mark.parametrize("case", ["t5", "t5 v1.1", "marian", "nllb"])
def test_greedy_translations_are_those_of_transformers(runtime, case, tmp_path):
    theirs = build_reference(*CASES[case][:2], **CASES[case][2] | {"eos_token_id": EOS})
    with torch.no_grad():  # layers that outweigh the tied embedding, which repeats its input
        for parameter in (p for n, p in theirs.named_parameters() if "layer" in n and p.dim() > 1):
            parameter.mul_(4.0)
    theirs.save_pretrained(tmp_path)
    reader = WeightReader(tmp_path)
    worker = tiny.make_worker(runtime, reader.model)
    reader.load_parameters(worker.parameters())
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(3, 48, (4, 12), generator=generator)
    valid = torch.arange(12) < torch.tensor([[12], [5], [9], [1]])
    prefix = [7] if case == "nllb" else []
    options = {"forced_bos_token_id": 7} if prefix else {}
    with float64_for_float32(), torch.no_grad():
        expected = theirs.generate(
            input_ids=source,
            attention_mask=valid.long(),
            do_sample=False,
            num_beams=1,
            max_new_tokens=LENGTH + len(prefix),
            forced_eos_token_id=None,
            **options,
        )
    found = translate_tokens(
        worker,
        source,
        valid,
        max_tokens=LENGTH,
        bos_id=EOS,  # the model begins with its own
        end_ids=[EOS],
        prefix_ids=prefix,
    )
    for ours, row in zip(found, expected[:, 1 + len(prefix) :].tolist(), strict=True):
        assert ours == (row[: row.index(EOS)] if EOS in row else row)
    assert len({token for row in found for token in row}) > 1
