"""torchtitan's Trainer and its debug model on a CPU.

    python _titan.py --training.steps 3 ... / --training.steps 3 ...

runs ``torchtitan.train`` once for each list of arguments, under torchrun or not.
"""

from __future__ import annotations

import itertools
import os
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torchtitan.tools import utils


def answer_for_a_gpu() -> None:
    """torchtitan 0.3.0 knows no CPU: it asks the device for its name, its memory and its number, and
    NCCL for products. Called before `torchtitan.trainer` is imported."""
    cpu = types.SimpleNamespace(
        set_device=lambda device: None,
        device_count=lambda: 1,
        current_device=lambda: 0,
        synchronize=lambda: None,
        get_device_name=lambda device: "CPU",
        get_device_properties=lambda device: types.SimpleNamespace(total_memory=1 << 34),
        reset_peak_memory_stats=lambda: None,
        empty_cache=lambda: None,
        memory_stats=lambda device: {},
    )
    utils.device_type, utils.device_module = "cpu", cpu
    if not hasattr(torch.distributed, "set_timeout"):  # torchtitan 0.3.0 is for a later torch
        torch.distributed.set_timeout = lambda timeout, group: None
    divide = FSDPModule.set_gradient_divide_factor

    def by_sums(module: FSDPModule, factor: float) -> None:
        divide(module, factor)
        module.set_force_sum_reduction_for_comms(True)  # Gloo multiplies nothing on the way

    FSDPModule.set_gradient_divide_factor = by_sums


answer_for_a_gpu()

from torchtitan import trainer  # noqa: E402
from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.models.llama3.config_registry import llama3_debugmodel  # noqa: E402


class NoTokenizer(BaseTokenizer):
    """What the trainer asks of a tokenizer where the data are tokens: their number. The other two
    methods are abstract, and nobody calls them."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: Any) -> None:
        super().__init__()

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        raise AssertionError("the data are tokens: there is no text to encode")

    def decode(self, *args: Any, **kwargs: Any) -> str:
        raise AssertionError("the data are tokens: there is no text to decode to")

    def get_vocab_size(self) -> int:
        return 2048


class Tokens(BaseDataLoader):
    """Random tokens of a skewed distribution; a third of the labels is ignored."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: BaseTokenizer,
        seq_len: int,
        local_batch_size: int,
        **_: Any,
    ) -> None:
        self.shape = local_batch_size, seq_len
        self.ranks, self.rank = dp_world_size, dp_rank

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        batch, length = self.shape
        generator = torch.Generator().manual_seed(0)
        while True:
            draw = torch.rand(self.ranks * batch, length + 1, generator=generator)
            tokens = (2048 * draw**4).long()[self.rank * batch :][:batch]
            labels = tokens[:, 1:].clone()
            labels[:, : length // 3] = -100
            positions = torch.arange(length).expand(batch, -1)
            yield {"input": tokens[:, :-1], "positions": positions}, labels

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def debug() -> trainer.Trainer.Config:
    """torchtitan's own debug model, with attention that has a gradient on a CPU."""
    config = llama3_debugmodel()
    config.tokenizer, config.dataloader = NoTokenizer.Config(), Tokens.Config()
    for layer in config.model_spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config.training.disable_cuda_graphs = True
    config.training.mixed_precision_param = "float32"
    config.training.local_batch_size, config.training.seq_len = 2, 64
    config.validator.enable = False
    config.metrics.disable_color_printing = True
    config.debug.seed = 0
    return config


if __name__ == "__main__":
    from torchtitan.train import main

    one_process = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    os.environ |= one_process | {"MASTER_PORT": "0"} | os.environ
    trainer.time.sleep = lambda seconds: None
    for _, arguments in itertools.groupby(sys.argv[1:], "/".__ne__):
        sys.argv = ["train", "--module", "_titan", "--config", "debug", *arguments]
        if sys.argv[-1] != "/":
            torch._dynamo.reset()
            main()
