"""Llamas in more depths and lengths than torchtune has builders for."""

from __future__ import annotations

from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerDecoder

SIZES = {
    "llama3_2_1b": dict(
        vocab_size=128_256,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        embed_dim=2048,
        intermediate_dim=8192,
        max_seq_len=131_072,
    ),
    "tiny": dict(
        vocab_size=512,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=64,
        intermediate_dim=128,
        max_seq_len=2048,
    ),
}


def llama(model: str, **changed: int) -> TransformerDecoder:
    return llama3_2(**(SIZES[model] | changed))
