"""Trainer under DDP and accelerate's FSDP2 in two processes, compiled with liger_fx: what one process
computes on the joint batch, and no logits made."""

from __future__ import annotations

import functools
import itertools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _util import relative_error
from torch import nn
from torch.distributed.fsdp import FSDPModule

import liger_fx
from liger_fx.deferred import materialized

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from _trainer import collator, language_model, samples  # noqa: E402
from test_huggingface import OPTIONS, fused_heads, run  # noqa: E402

from liger_fx import unpadding  # noqa: E402
from liger_fx.huggingface import LigerFxPlugin, defer_logits  # noqa: E402
from liger_fx.huggingface import compile as by_layers  # noqa: E402

pytestmark = pytest.mark.integrations
needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
devices = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=needs_gloo),
        pytest.param("cuda", marks=[pytest.mark.gpu, needs_two_gpus]),
    ],
)

JOINT_BATCH = 4
# DDPOptimizer splits a graph above a MiB of parameters.
large_head = functools.partial(language_model, hidden_size=64, vocab_size=8192)
tied = functools.partial(language_model, tie_word_embeddings=True)


Job = Callable[[Path, int, str], dict[str, Any]]  # (folder, world, device) -> by cases


def outcomes(folder: Path, job: Job, world: int, device: str) -> list[dict[str, dict[str, Any]]]:
    """What each of ``world`` processes makes of ``job``, on CPUs under gloo or on a GPU each under
    NCCL."""
    torch.multiprocessing.spawn(_process, (world, device, str(folder), job), nprocs=world)
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=False) for rank in range(world)]


def _process(rank: int, world: int, device: str, folder: str, job: Job) -> None:
    warnings.simplefilter("ignore")
    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world)
    )
    os.environ |= dict(MASTER_ADDR="localhost")
    if device == "cpu":
        os.environ |= dict(ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")
    else:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        init_method=f"file://{folder}/store-{world}",
        rank=rank,
        world_size=world,
    )
    torch.save(job(Path(folder) / str(rank), world, device), f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


# -- DDP -------------------------------------------------------------------------------------------

DDP_CASES: dict[str, dict[str, Any]] = {
    "default": {},  # find_unused_parameters=True
    "all used": dict(ddp_find_unused_parameters=False),
    "tied": dict(model=tied),
    "bf16": dict(bf16=True),
    "accumulation": dict(gradient_accumulation_steps=2),
    "checkpointing": dict(gradient_checkpointing=True),
    "padding": dict(lengths=(16, 14)),
    "split": dict(model=large_head),
    "split, all used": dict(model=large_head, ddp_find_unused_parameters=False),
    "split, tied": dict(model=functools.partial(large_head, tie_word_embeddings=True)),
    "split, small buckets": dict(model=large_head, ddp_bucket_cap_mb=1),
    "layers": dict(by_layers=True),
    "layers, bf16": dict(by_layers=True, bf16=True),
    "layers, checkpointing": dict(by_layers=True, gradient_checkpointing=True),
    "layers, padding left out": dict(by_layers=True, unpad=True, lengths=(16, 9)),
    "layers, tied, small buckets": dict(
        by_layers=True,
        model=functools.partial(large_head, tie_word_embeddings=True),
        ddp_bucket_cap_mb=0.01,
    ),
}


def _under_ddp(folder: Path, world: int, device: str) -> dict[str, Any]:
    unpadding.UNIT, found = 1, {}
    for name, case in DDP_CASES.items():
        whole = world > 1 and not case.get("by_layers")
        done = run(
            folder,
            liger_fx.backend(**OPTIONS) if whole else None,
            use_cpu=device == "cpu",
            per_device_train_batch_size=JOINT_BATCH // world,
            **(case if world > 1 else case | {"by_layers": False}),
        )
        found[name] = dict(
            losses=done.losses,
            updates=done.updates,
            read=done.read,
            heads=fused_heads(),
            deferred=[len(report.deferred) for report in liger_fx.reports()],
            modules=[len(report.modules) for report in liger_fx.reports()],
        )
    return found


@devices
def test_ddp(device, tmp_path):
    (joint,) = outcomes(tmp_path, _under_ddp, 1, device)
    for two in outcomes(tmp_path, _under_ddp, 2, device):
        for name, case in two.items():
            tolerance = 2e-3 if "bf16" in name else 1e-5
            assert case["losses"] == pytest.approx(joint[name]["losses"], rel=tolerance), name
            for parameter, update in case["updates"].items():
                error = relative_error(update, joint[name]["updates"][parameter])
                assert error <= 30 * tolerance, (name, parameter)
            assert case["read"] == (0, 0), name
            if "layers" in name:  # whole, and of evaluation; the checkpoint's are of its own
                assert case["modules"][:2] == [1, 2], (name, case["modules"])
                continue
            assert case["deferred"] == case["heads"], name
            assert set(case["heads"]) == ({0, 1} if _in_parts(name) else {1}), name


def _in_parts(case: str) -> bool:
    """DDPOptimizer splits large graphs; of torch 2.11 it leaves a model with checkpoints, and Dynamo
    breaks the graph before the final norm."""
    return case.startswith("split") or (case == "checkpointing" and torch.__version__ < "2.12")


# -- FSDP2 -----------------------------------------------------------------------------------------


def _train(accelerator: Any, model: nn.Module, world: int, *lengths: int) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    data = samples(16, *lengths)
    data = [data[i ^ 3 if i % 4 in (1, 2) else i] for i in range(16)]  # both lengths in each batch
    loader = torch.utils.data.DataLoader(data, JOINT_BATCH // world, collate_fn=collator())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    before, losses, gradients = materialized(), [], {}
    for step, batch in enumerate(loader):
        loss = model(**batch).loss
        accelerator.backward(loss)
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        for name, parameter in model.named_parameters():
            gradient: Any = parameter.grad
            name = name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")
            whole = getattr(gradient, "full_tensor", gradient.clone)()
            gradients[f"{name} {step}"] = whole.cpu()
        optimizer.step()
        optimizer.zero_grad()
    units = sum(isinstance(module, FSDPModule) for module in model.modules())
    return dict(losses=losses, gradients=gradients, read=materialized() - before, units=units)


MODELS = {"untied": language_model, "tied": tied}
LENGTHS = {"plugin": (), "layers": (), "unpadded": (16, 9)}


def _under_fsdp(folder: Path, world: int, device: str) -> dict[str, Any]:
    unpadding.UNIT, found = 1, {}
    for way, (name, model), mixed_precision, checkpointing in itertools.product(
        LENGTHS, MODELS.items(), ("no", "bf16"), (False, True)
    ):
        torch._dynamo.reset()
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        fused = world > 1
        dynamo = LigerFxPlugin(options=OPTIONS, use_regional_compilation=True)
        fsdp = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,
            activation_checkpointing=checkpointing,
        )
        accelerator = accelerate.Accelerator(
            cpu=device == "cpu",
            mixed_precision=mixed_precision,
            dynamo_plugin=dynamo if fused and way == "plugin" else None,
            fsdp_plugin=fsdp if fused and device != "cpu" else None,
        )
        # accelerate allows TF32 on a GPU where it compiles, and one process does not compile.
        torch.backends.cuda.matmul.allow_tf32 = False
        made = model()
        if fused:
            if device == "cpu":
                _shard_on_a_cpu(accelerator, fsdp)
            if way == "plugin":
                defer_logits(made)
            else:
                by_layers(made, unpad=way == "unpadded", **OPTIONS)
        elif checkpointing:
            made.gradient_checkpointing_enable()
        case = f"{way}, {name}, {mixed_precision}, checkpointing={checkpointing}"
        found[case] = _train(accelerator, made, world, *LENGTHS[way])
    return found


def _shard_on_a_cpu(accelerator: Any, plugin: Any) -> None:
    """accelerate has FSDP2 for GPUs alone, and would take DDP."""
    accelerator.state._shared_state |= dict(
        distributed_type=accelerate.DistributedType.FSDP, fsdp_plugin=plugin
    )
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)


@devices
def test_fsdp2(device, tmp_path):
    (joint,) = outcomes(tmp_path, _under_fsdp, 1, device)
    for two in outcomes(tmp_path, _under_fsdp, 2, device):
        for name, case in two.items():
            tolerance = 5e-3 if "bf16" in name else 1e-5
            assert case["losses"] == pytest.approx(joint[name]["losses"], rel=tolerance), name
            for parameter, gradient in joint[name]["gradients"].items():
                error = relative_error(case["gradients"][parameter], gradient)
                assert error <= 30 * tolerance, (name, parameter)
            # Two layers, embedding, norm, projection and root, and the layers' checkpoint wrappers.
            units = 8 if "checkpointing=True" in name else 6
            assert case["read"] == 0 and case["units"] == units, name
