"""Hugging Face: ways in for those who do not compile the model themselves.

``model.compile(backend="liger_fx")`` needs nothing of this. Trainer's ``torch_compile_backend``
takes only the names that accelerate lists, so `LigerFxCallback` compiles in its place, and
`LigerFxPlugin` is for loops over an `accelerate.Accelerator`. `compile` compiles one layer for all,
which takes a fraction of the time. Where head and loss are never in one graph, as there and under
FSDP2, `defer_logits` brings them together.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel, TrainerCallback

from liger_fx.activations import (
    MemoryBudget,
    bytes_of,
    keep_last,
    keeping,
    peak_of_all_ranks,
    require_gpu,
    room_on_all_ranks,
)
from liger_fx.deferred import DeferredLogits, Head
from liger_fx.dynamo import Backend, backend
from liger_fx.offload import Offload
from liger_fx.options import Options
from liger_fx.report import Place, Rejection, Report
from liger_fx.unpadding import PLAN, leave_out_padding

log = logging.getLogger("liger_fx")

_WITH_A_CACHE = (
    "liger_fx: layers that are given a cache of keys and values are not compiled; "
    "for training call the model with use_cache=False"
)

DEEP = 8  # equal layers: to compile each of them takes longer than all the rest
OF_LAYERS = {"dynamic", "offload", "unpad", "memory_gib"}  # options of `compile` alone


class LigerFxCallback(TrainerCallback):
    """``Trainer(..., callbacks=[LigerFxCallback()])``: compiles the model with liger_fx, in
    place: one with 8 equal layers or more by `compile`, others as one graph.

    options: as for `compile`. With ``dynamic``, ``offload``, ``unpad`` or ``memory_gib`` `compile`
    takes models of any depth: ``LigerFxCallback(unpad=True)``. Raises OptionError, a ValueError.
    """

    def __init__(self, **options: Any) -> None:
        self._of_layers = {name: options.pop(name) for name in OF_LAYERS & options.keys()}
        self._backend = backend(**options)
        self._options = options

    def on_init_end(self, args: Any, state: Any, control: Any, **trained: Any) -> None:
        self._compile(trained["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **trained: Any) -> None:
        # With ``model_init``, ``train()`` has made a new model.
        if all(module._compiled_call_impl is None for module in trained["model"].modules()):
            self._compile(trained["model"])

    def _compile(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and module.loss_type is None:
                # transformers would take this one, with a log line, at which Dynamo ends the graph.
                module.loss_type = "ForCausalLM"
        if self._of_layers or any(len(names) >= DEEP for names in _regions(model).values()):
            compile(model, **self._of_layers, **self._options)
        else:
            model.compile(backend=self._backend)


@dataclass
class LigerFxPlugin(TorchDynamoPlugin):
    """``Accelerator(dynamo_plugin=LigerFxPlugin())``: the model is compiled with liger_fx.

    Takes the arguments of `accelerate.utils.TorchDynamoPlugin` but for ``backend``. options: as for
    ``options=`` of `torch.compile`.
    """

    def __post_init__(self) -> None:
        self.backend = "inductor"  # a name that accelerate knows
        super().__post_init__()

    def to_kwargs(self) -> dict[str, Any]:
        return dict(super().to_kwargs()) | {"backend": "liger_fx"}


def compile(
    model: nn.Module,
    *,
    dynamic: bool | None = None,
    offload: bool = False,
    unpad: bool = False,
    memory_gib: float | str | None = None,
    **options: Any,
) -> nn.Module:
    """Compile the layers of a causal language model with liger_fx, in place, equal layers once, and
    let its logits be deferred (`defer_logits`).

    model: of transformers, maybe with adapters or under a wrapper. The layers are the items of its
    outermost ``nn.ModuleList``s. A layer's own activation checkpoint becomes part of its graph.
    Norms beside the layers are compiled too, and everything else runs as it is. A layer that is
    given a cache, as in generation, is not compiled: ``config.use_cache`` is switched off, as by
    Trainer. Each report says which modules run its graph.
    dynamic: as for `torch.compile`. True where batches differ in length: one graph is for all of
    them then, where otherwise the first batch has one of its own.
    offload: what a layer saves for its backward waits in the host's memory. With checkpoints this
    is little more than its input.
    unpad: the layers run without the padding of a batch, and once over tokens that several of its
    sequences begin with (`liger_fx.unpadding`); what the model says of padding is of zeros.
    memory_gib: how many GiB of a GPU may be allocated, or "auto" for what is free at the second
    step of an optimizer: as many checkpointed layers as fit keep the outputs of their matrix
    products and of attention (`liger_fx.activations`). For batches of one size.
    options: as for `liger_fx.backend`. Returns ``model``. Raises ValueError for a model without
    layers, or whose padding cannot be left out, and OptionError, a ValueError.
    """
    regions = _regions(model)
    if not regions:
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList of layers to compile one by one; "
            'use model.compile(backend="liger_fx")'
        )
    shared = backend(**options)
    if memory_gib is not None and offload:
        raise ValueError("memory_gib keeps activations on the GPU, and offload takes them off it")
    budget = bytes_of("auto" if memory_gib is None else memory_gib)
    if unpad:
        leave_out_padding(model, _language_model(model))
    if memory_gib is not None:
        _keep_within(model, budget)
    for module in model.modules():
        if any(map(_calls_itself, _items(module))):
            module.register_forward_pre_hook(_hold_checkpoints)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.get_text_config().use_cache = False
    shared.publish(_report_on_head(model, shared.options))
    mover = Offload() if offload else None
    for names in regions.values():
        of_region = copy.copy(shared)
        of_region.accept = functools.partial(_tell_modules, names)
        form = _Form(of_region, dynamic, mover)
        for name in names:
            module = model.get_submodule(name)
            module._compiled_call_impl = functools.partial(form, module)
    return model


class _Form:
    """Equal modules, with one compiled region: one for each way in which they have hooks, since
    Dynamo does not guard that a module has none, and one with the checkpoint that is around them.
    """

    def __init__(self, backend: Backend, dynamic: bool | None, offload: Offload | None) -> None:
        self.backend, self.dynamic, self.offload = backend, dynamic, offload
        self.regions: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _fills_a_cache(module, *args, *kwargs.values()):
            return module._call_impl(*args, **kwargs)
        held = _held_checkpoint(module)
        code = _region if held is None else _checkpointed_region
        unpadded = kwargs.get(PLAN) is not None
        key = code, _hooked(module), unpadded
        if key not in self.regions:
            # The number of tokens is another one in each batch without padding.
            dynamic = True if unpadded else self.dynamic
            self.regions[key] = torch.compile(
                _own_code(code), backend=self.backend, dynamic=dynamic
            )
        given = (module,) if held is None else (module, held)
        run: Callable[..., Any] = functools.partial(self.regions[key], *given)
        if self.offload is not None:
            run = self.offload.around(run, module)
        config: dict[str, Any] = {}
        if DistributedDataParallel._get_active_ddp_module() is not None:
            # Gradients are sent layer by layer without DDPOptimizer, which would cut a layer.
            config["optimize_ddp"] = False
        if unpadded or self.dynamic:
            # Under dynamic=True the floats of a module (epsilon, dropout) become tensors on the
            # CPU, and Inductor builds C++ kernels for them: 58 of 78 s beside an H200.
            config["specialize_float"] = True
        with torch._dynamo.config.patch(config) if config else contextlib.nullcontext():
            return run(*args, **kwargs)


# -- checkpoints -----------------------------------------------------------------------------------


class _Held:
    """The checkpoint of a compiled layer that puts it around its own call, as those of transformers
    before 5.23. The layer's region holds it, and then there is none around the region.

    asked: the layer that runs now wants it.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint
        self.asked = False

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.checkpoint(function, *args)
        self.asked = True
        try:
            return function(*args)
        finally:
            self.asked = False


def _hold_checkpoints(parent: nn.Module, *_: Any) -> None:
    """Before a forward of the module that has the layers. At each one, since checkpoints may be
    switched on at any time."""
    if torch.compiler.is_compiling():
        return
    held: _Held | None = None
    layer: Any
    for layer in _items(parent):
        if layer._compiled_call_impl is None or not _calls_itself(layer):
            continue
        around: Any = vars(layer).get("_gradient_checkpointing_func")
        if getattr(around, "func", None) is checkpoint:  # torch's, with its settings
            if held is None or held.checkpoint is not around:
                held = _Held(around)
            layer._gradient_checkpointing_func = held


def _held_checkpoint(module: nn.Module) -> Callable[..., Any] | None:
    held = vars(module).get("_gradient_checkpointing_func")
    return held.checkpoint if isinstance(held, _Held) and held.asked else None


def _items(module: nn.Module) -> Iterator[nn.Module]:
    """Of the lists of layers in a module."""
    return (
        layer for child in module.children() if isinstance(child, nn.ModuleList) for layer in child
    )


def _calls_itself(module: nn.Module) -> bool:
    return type(module).__call__ is not nn.Module.__call__


# -- layers that keep their activations ------------------------------------------------------------


def _keep_within(model: nn.Module, budget: int | None) -> None:
    """Before each step of an optimizer of the model's parameters, look at the memory. budget:
    bytes; None for what the GPU has."""
    of_model = weakref.ref(model)
    budgets: list[MemoryBudget] = []

    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        trained = of_model()
        if trained is None or not optimizer.state or not _optimizes(optimizer, trained):
            return
        if not budgets:
            budgets.append(_memory_budget(trained, budget))
        budgets[0](optimizer)

    weakref.finalize(model, register_optimizer_step_pre_hook(before_step).remove)


def _optimizes(optimizer: torch.optim.Optimizer, model: nn.Module) -> bool:
    trained = set(model.parameters())
    return any(p in trained for group in optimizer.param_groups for p in group["params"])


def _memory_budget(model: nn.Module, budget: int | None) -> MemoryBudget:
    layers = [
        module
        for module in model.modules()
        if module._compiled_call_impl is not None
        and getattr(module, "gradient_checkpointing", False)
        and hasattr(module, "_gradient_checkpointing_func")
    ]
    if not layers:
        raise ValueError(
            "memory_gib chooses how many checkpointed layers keep their activations, and "
            f"{type(model).__name__} has none: call model.gradient_checkpointing_enable()"
        )
    device = next(model.parameters()).device
    require_gpu(device)
    budget = room_on_all_ranks(device) if budget is None else budget
    peak = functools.partial(peak_of_all_ranks, device)
    return MemoryBudget(functools.partial(_keep, layers), len(layers), budget, peak, log.info)


def _keep(layers: Sequence[Any], count: int) -> None:
    keep_last(layers, count, "_gradient_checkpointing_func", lambda layer: _KEEPING)


_KEEPING = _Held(keeping)


# -- hooks and regions -----------------------------------------------------------------------------


def _hooked(module: nn.Module) -> tuple[int, ...]:
    """Which of a module's parts have hooks, by their place in a walk. It runs at each call, and
    ``module.modules()`` puts names together, which takes longer."""
    found: list[int] = []
    parts = [module]
    for i, part in enumerate(parts):
        if (
            part._forward_hooks
            or part._forward_pre_hooks
            or part._backward_hooks
            or part._backward_pre_hooks
        ):
            found.append(i)
        parts.extend(child for child in part._modules.values() if child is not None)
    return tuple(found)


def _region(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # `self` is left out of places
    return self._call_impl(*args, **kwargs)


def _checkpointed_region(self: Any, around: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return around(functools.partial(self._call_impl, **kwargs), *args)


def _fills_a_cache(module: nn.Module, *given: Any) -> bool:
    """A graph that fills a cache holds the index of its layer: each layer would be compiled."""
    if not any(isinstance(argument, Cache) for argument in given):
        return False
    if module.training and getattr(module, "gradient_checkpointing", False):
        return False  # the layer leaves the cache out
    if module.training and torch.is_grad_enabled():
        torch._logging.warning_once(log, _WITH_A_CACHE)
    return True


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of ``function`` with a limit of recompilations of its own: Dynamo counts them for each
    code object."""
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, function.__name__)


def _regions(model: nn.Module) -> dict[Any, list[str]]:
    """The names of the modules to compile, by form. Equal forms may still become two graphs, since
    Dynamo guards what a form does not tell."""
    found: dict[Any, list[str]] = {}
    for name, module in _layers_and_norms(model):
        found.setdefault(_form(module), []).append(name)
    return found


def _layers_and_norms(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    children = [(prefix + name, child) for name, child in module.named_children()]
    lists = [(name, child) for name, child in children if isinstance(child, nn.ModuleList)]
    for name, layers in lists:
        yield from ((f"{name}.{i}", m) for i, m in enumerate(layers) if any(m.children()))
    for name, child in children:
        if lists and _is_norm(child):
            yield name, child
        elif not isinstance(child, nn.ModuleList):
            yield from _layers_and_norms(child, f"{name}.")


def _is_norm(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and all(p.dim() == 1 for p in parameters)


def _form(module: nn.Module) -> Any:
    """Modules, parameters and settings of a layer, without numbers: one may be its index."""
    settings = [
        (name, type(m), [(k, v) for k, v in vars(m).items() if isinstance(v, str | bool)])
        for name, m in module.named_modules()
    ]
    parameters = [(n, p.shape, p.dtype, p.requires_grad) for n, p in module.named_parameters()]
    return repr((settings, parameters))


def _tell_modules(names: list[str], report: Report) -> None:
    report.modules = names


def _report_on_head(model: nn.Module, options: Options) -> Report:
    """Defer the logits, if they shall and can be."""
    try:
        _require_chosen(options)
        projection = defer_logits(_language_model(model)).get_output_embeddings()
    except ValueError as error:
        return Report(rejections=[Rejection("linear_cross_entropy", str(error))])
    name = next(name for name, module in model.named_modules() if module is projection)
    return Report(deferred=[Place(name)], modules=[name])


def _require_chosen(options: Options) -> None:
    name, policy = "linear_cross_entropy", options.policy
    listed = isinstance(policy, str) or name in policy
    if not listed or name in options.disable or options.logits != "on_demand":
        raise ValueError("the options policy, disable or logits leave the head as it is")


def _language_model(model: nn.Module) -> PreTrainedModel:
    for module in model.modules():  # below adapters and wrappers
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError(f"{type(model).__name__} holds no model of transformers")


def defer_logits(model: PreTrainedModel) -> PreTrainedModel:
    """Let the projection of a causal language model return `liger_fx.DeferredLogits`, and the
    model's own loss run on them, fused.

    For a model whose projection and loss are in no graph together: wrapped by FSDP2, compiled layer
    by layer, or not compiled. Before or after wrapping, in place. Returns ``model``. Raises
    ValueError if the output embedding is no plain ``nn.Linear``, as with LoRA on it.
    """
    projection = model.get_output_embeddings()
    if not isinstance(projection, nn.Linear) or type(projection).forward is not nn.Linear.forward:
        raise ValueError(
            f"the output embedding of {type(model).__name__} is {type(projection).__name__}, "
            "expected torch.nn.Linear; the logits of this model cannot be deferred"
        )

    # Neither may be traced: a graph would compute the logits that go into it.
    projection.forward = types.MethodType(_deferred, projection)  # type: ignore[method-assign]
    model.loss_function = torch.compiler.disable(model.loss_function)
    return model


@torch.compiler.disable
def _deferred(projection: nn.Linear, hidden: Tensor) -> Tensor:
    parameters = [p for p in (projection.weight, projection.bias) if p is not None]
    if any(isinstance(tensor, DTensor) for tensor in (hidden, *parameters)):  # tensor parallelism
        return F.linear(hidden, *parameters)
    device = hidden.device.type
    under_autocast = torch.is_autocast_enabled(device)
    return DeferredLogits(
        Head(F.linear, tuple(parameters)),
        hidden,
        classes=projection.out_features,
        dtype=torch.get_autocast_dtype(device) if under_autocast else hidden.dtype,
        requires_grad=torch.is_grad_enabled()
        and any(t.requires_grad for t in (hidden, *parameters)),
    )
