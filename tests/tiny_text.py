"""A real text encoder and tokenizer, tiny, made on the spot: their words are single letters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, BertTokenizer

WIDTH, LIMIT = 8, 12
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tiny_encoder(width: int = WIDTH, seed: int = 0) -> BertModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return BertModel(BertConfig(**sizes, vocab_size=64, max_position_embeddings=LIMIT)).eval()


def tiny_tokenizer() -> BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=LIMIT)


def text_folder(path: Path, **arguments: Any) -> str:
    """The folder of a tiny encoder with its tokenizer."""
    tiny_encoder(**arguments).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)
