"""A Hugging Face folder to begin with: a small Llama, a tokenizer and a chat template."""

from pathlib import Path

import torch

from trainer.config.train import ModelConfig
from trainer.data.chat_template import TEMPLATES
from trainer.data.tokenizer import Tokenizer
from trainer.huggingface.registry import architecture_for
from trainer.huggingface.weights import parameter_shapes
from trainer.huggingface.writer import write_config, write_weights
from trainer.nn.init import init_rows


def write_model_folder(folder: Path, text: str) -> None:
    """Write the folder, with random weights and a tokenizer of the text."""
    folder.mkdir()
    tokenizer = Tokenizer.train([text], 512)
    tokenizer.save(folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(TEMPLATES["plain"])
    model = ModelConfig(
        layers=2,
        width=64,
        heads=4,
        kv_heads=2,
        ffn_width=96,
        vocab_size=512,
        max_positions=512,
    )
    shapes = parameter_shapes(model)

    def weights(name: str) -> torch.Tensor:
        return init_rows(model, 0, name, shapes[name], 0, shapes[name][0])

    architecture, ids = architecture_for(model), {"eos_token_id": tokenizer.eot_id}
    write_weights(folder, architecture, model, weights, torch.float32)
    write_config(folder, architecture, model, torch.float32, ids)
