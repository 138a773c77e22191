"""torchtune's decoders in tiny, and a group of processes of one."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from _util import DEVICE, TOLERANCES, relative_error
from torchtune import training
from torchtune.models import gemma, gemma2, llama2, llama3, llama3_2, mistral, phi3, qwen2

V, B, S = 131, 2, 16
SIZES: dict[str, Any] = dict(
    vocab_size=V, num_layers=1, num_heads=4, num_kv_heads=2, embed_dim=32, max_seq_len=32,
    intermediate_dim=48,
)  # fmt: skip
FAMILIES = {
    "llama2": llama2.llama2,
    "llama3": llama3.llama3,
    "llama3_2": llama3_2.llama3_2,
    "mistral": mistral.mistral,
    "gemma": functools.partial(gemma.gemma, head_dim=8),
    "gemma2": functools.partial(
        gemma2.gemma2,
        head_dim=8,
        hidden_capping_value=50.0,
        final_capping_value=30.0,
        sliding_window_size=8,
    ),
    "phi3": phi3.phi3,
    "qwen2": qwen2.qwen2,
    "qwen2_tied": functools.partial(qwen2.qwen2, tie_word_embeddings=True),
}


def build(
    family: str, dtype: torch.dtype = torch.float32, *, num_layers: int = 1
) -> torch.nn.Module:
    with training.set_default_dtype(dtype), torch.device(DEVICE):
        built = FAMILIES[family](**SIZES | {"num_layers": num_layers})
    for parameter in built.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return built


def assert_close(actual, expected, dtype=torch.float32):
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 10 * TOLERANCES[dtype]


@contextlib.contextmanager
def group_of_one():
    """FSDP2 shards, gathers and hooks in it as it does in a larger one."""
    backend = "cuda:nccl,cpu:gloo" if DEVICE == "cuda" else "gloo"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        if torch.distributed.is_initialized():  # a recipe's clean-up ends it
            torch.distributed.destroy_process_group()
