"""torchtitan's losses and its trainer under liger_fx: losses and gradients are torchtitan's.

torchtitan 0.3.0 wants older datasets than the other integrations: it has an environment of its own.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from _util import relative_error
from torch import Tensor, nn

import liger_fx

pytestmark = pytest.mark.integrations
pytest.importorskip("torchtitan")

from torchtitan.components.loss import (  # noqa: E402
    BaseLoss,
    ChunkedLossWrapper,
    CrossEntropyLoss,
    compute_logprobs,
)
from torchtitan.config.override import OverrideConfig, apply_overrides  # noqa: E402
from torchtitan.models.common import Linear  # noqa: E402
from torchtitan.models.llama3.config_registry import llama3_debugmodel  # noqa: E402
from torchtitan.models.muse_glimmer.model import SoftCappedLinear  # noqa: E402

from liger_fx.torchtitan import AttentionInLayer, FusedLoss  # noqa: E402

B, S, H, V = 2, 16, 24, 50


class LogProbs(BaseLoss):
    """As a policy gradient has it: weights of tokens, and metrics."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        pass

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        pass

    def __call__(self, pred, labels, global_valid_tokens=None, *, advantages, positions):
        scores = compute_logprobs(pred, labels) * advantages
        loss = -scores.sum() / global_valid_tokens
        return loss, {"scores/mean": scores.detach().sum() / global_valid_tokens}


class Squares(LogProbs):
    """Reads the logits."""

    @dataclass(kw_only=True, slots=True)
    class Config(LogProbs.Config):
        pass

    def __call__(self, pred, labels, global_valid_tokens=None, **_: Any):
        return pred.float().square().sum() / global_valid_tokens, {}


def capped(**sizes: int) -> Any:
    return SoftCappedLinear.Config(**sizes, output_multiplier=0.5, output_soft_cap_temp=3.0)


Outcome = tuple[Tensor, dict[str, Tensor], list[Tensor]]


def outcome(wrapper: type, loss: BaseLoss.Config, head: Callable[..., Any]) -> Outcome:
    """Value, metrics and gradients of ``loss`` over a random projection."""
    torch.manual_seed(0)
    chunked = wrapper.Config(loss_fn=loss, num_chunks=4).build(compile_config=None)
    projection: nn.Module = head(in_features=H, out_features=V).build()
    chunked.set_lm_head(projection)
    hidden = torch.randn(B, S, H, requires_grad=True)
    labels = torch.randint(V, (B, S))
    labels[:, :5] = -100
    inputs = dict(positions=torch.arange(S).expand(B, S))
    if isinstance(loss, LogProbs.Config):
        inputs["advantages"] = torch.randn(B, S)
    forward = projection.forward
    value, metrics = chunked(hidden, labels, torch.tensor(22), **inputs)
    assert projection.forward == forward
    with torch.no_grad():
        torch.testing.assert_close(
            chunked(hidden.detach(), labels, torch.tensor(22), **inputs)[0], value
        )
    value.backward()
    return value, metrics, [hidden.grad, *(p.grad for p in projection.parameters())]


with_bias = functools.partial(Linear.Config, bias=True)


@pytest.mark.parametrize(
    ("loss", "head", "made"),
    [
        (CrossEntropyLoss.Config(), Linear.Config, "linear_cross_entropy"),
        (CrossEntropyLoss.Config(), with_bias, "linear_cross_entropy"),
        (CrossEntropyLoss.Config(), capped, "linear_cross_entropy"),  # Muse Glimmer's head
        (LogProbs.Config(), Linear.Config, "linear_cross_entropy"),
        (Squares.Config(), Linear.Config, None),
    ],
    ids=["plain", "bias", "capped", "logprobs", "logits"],
)
def test_losses(loss, head, made, monkeypatch, caplog):
    monkeypatch.setenv("LIGER_FX_INNER", "aot_eager")
    expected = outcome(ChunkedLossWrapper, loss, head)
    with caplog.at_level(logging.WARNING):
        actual = outcome(FusedLoss, loss, head)
    torch.testing.assert_close(actual[:2], expected[:2])
    for a, e in zip(actual[2], expected[2], strict=True):
        assert relative_error(a, e) < 2e-6
    if made:
        assert [report.counts for report in liger_fx.reports()] == [{made: 1}]
    else:
        assert not liger_fx.reports()
        assert "stay in torchtitan's chunks: what the loss does" in caplog.text


def overridden(*names: str) -> Any:
    config = llama3_debugmodel()
    apply_overrides(
        OverrideConfig(imports=[f"liger_fx.torchtitan.{name}" for name in names]), config
    )
    return config


def test_overrides():
    config = overridden("fused_loss", "attention_in_layers")
    assert type(config.loss) is FusedLoss.Config
    assert (config.loss.num_chunks, config.loss.loss_fn.global_vocab_size) == (8, 2048)
    kinds = {type(layer.attention.inner_attention) for layer in config.model_spec.model.layers}
    assert kinds == {AttentionInLayer.Config}


# -- the trainer -----------------------------------------------------------------------------------

FUSED = ["--override.imports", "liger_fx.torchtitan.fused_loss"]
LAYERS = ["--compile.enable", "--compile.backend", "liger_fx"]


def train(folder: Path, *runs: list[str], processes: int = 1, **environ: str) -> tuple[Any, str]:
    """Losses and norms of the gradients of each run, in turn, and everything that they logged."""
    arguments = []
    for run in runs:
        arguments += ["--training.steps", "3", "--dump_folder", str(folder), *run, "/"]
    script = str(Path(__file__).with_name("_titan.py"))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), script, *arguments],
        env=os.environ | {"LIGER_FX_INNER": "aot_eager", **environ},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    steps = re.findall(r"step: +\d.*? loss: +(\S+) +grad_norm: +(\S+)", said)
    numbers = [float(number) for step in steps[::processes] for number in step]
    assert len(numbers) == 6 * len(runs), said
    return [numbers[i : i + 6] for i in range(0, len(numbers), 6)], said


def test_debug_model(tmp_path):
    (stock, fused, layers), said = train(
        tmp_path, [], FUSED, [*FUSED, *LAYERS], LIGER_FX_POLICY="all", TORCH_LOGS="liger_fx"
    )
    assert fused == pytest.approx(stock, abs=3e-5)
    assert layers == pytest.approx(stock, abs=3e-5)
    assert said.count("linear_cross_entropy 1") >= 2
    assert "rope 2, add_rms_norm 1, rms_norm 1, tiled_mlp 1" in said


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_two_processes(tensor_parallel, tmp_path):
    """torch 2.13 knows torchtitan's default, ``spmd_types``, on one process alone."""
    sharded = ["--parallelism.spmd_backend", "partial_dtensor"]
    sharded += ["--parallelism.tensor_parallel_degree", str(tensor_parallel)]
    (stock,), _ = train(tmp_path, sharded, processes=2)
    (fused,), said = train(tmp_path, [*sharded, *FUSED], processes=2)
    assert fused == pytest.approx(stock, abs=3e-5)
    one_op = "linear_cross_entropy 1"
    assert (one_op if tensor_parallel == 1 else "stay in torchtitan's chunks") in said


def test_flex_attention_under_another_name():
    """torchtitan's refusal, and the way around. A gradient of flex attention needs a GPU."""
    from torchtitan.distributed.compile import _maybe_regional_inductor_backend as chosen

    def model(*names: str) -> nn.Module:
        with torch.device("meta"):
            return overridden(*names).model_spec.model.build()

    with pytest.raises(ValueError, match="compile backend 'liger_fx' is neither"):
        chosen(model(), "liger_fx")
    assert chosen(model("attention_in_layers"), "liger_fx") == "liger_fx"
