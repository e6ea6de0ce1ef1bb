"""Small chat tokenizers, as Hugging Face folders, and conversations."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, processors

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 2's: it writes BOS itself, trims, and refuses what does not alternate.
INST = """{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}
    {%- set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + system + message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {%- generation %}{{- ' ' + message['content'] | trim + eos_token }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}"""
TEXT = ["system user assistant Be brief. Guten Morgen, wie geht es dir? [INST] [/INST] 123"] * 3
TALK = [
    {"role": "user", "content": "How are you?\n\n  Well? 日本 é 12345"},
    {"role": "assistant", "content": "Fine.\n"},
    {"role": "user", "content": " and  you"},
    {"role": "assistant", "content": "```py\nx = {'a': 1}\n```"},
]


def byte_level(folder: Path, template: str = CHATML) -> Path:
    """Write a byte-level BPE with ChatML's markers, like SmolLM2's and Qwen's."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    train(backend, special, pre_tokenizers.ByteLevel.alphabet())
    names = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return write(folder, backend, names, template, [0, 2])


def sentence_piece(folder: Path, template: str = INST) -> Path:
    """Write a BPE with byte fallback that puts BOS in front, like Llama 2's."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    train(backend, ["<unk>", "<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)], True)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return write(folder, backend, names, template, 2)


def train(backend, special, alphabet, as_tokens=False):
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[*special, *(alphabet if as_tokens else [])],
        initial_alphabet=[] if as_tokens else alphabet,
        show_progress=False,
    )
    # Word by word, so that no merge reaches across a space.
    backend.train_from_iterator(TEXT[0].split() * 3 if as_tokens else TEXT, trainer)
    if as_tokens:  # bytes are plain entries, not special ones
        values = json.loads(backend.to_str())
        values["added_tokens"] = [t for t in values["added_tokens"] if t["content"] in special]
        backend.__setstate__(json.dumps(values).encode())


def write(folder: Path, backend, names: dict, template: str, ends) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    (folder / "chat_template.jinja").write_text(template)
    return folder
