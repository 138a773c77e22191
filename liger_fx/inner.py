"""The compiler of the rewritten graph, and the key under which its results are cached."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import fx

from liger_fx import ops, passes
from liger_fx.bodies import checkpoint_eagerly, keep_in_checkpoints
from liger_fx.ops import library
from liger_fx.options import Options
from liger_fx.rewrite import Rewrite, kept_ops


def compile_rewritten(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    rewrites: Sequence[Rewrite],
) -> Callable[..., Any]:
    """Compile ``gm``, to which ``rewrites`` have been applied, with ``options.inner``."""
    keep_in_checkpoints(gm, kept_ops(rewrites, options.settings))
    if options.inner == "eager":
        checkpoint_eagerly(gm)
        return gm.forward
    if options.inner == "aot_eager":
        return torch._dynamo.lookup_backend("aot_eager")(gm, list(example_inputs))
    from torch._inductor.compile_fx import compile_fx

    _lower_as_calls()
    tag = ";".join(filter(None, [torch.compiler.config.cache_key_tag, environment(rewrites)]))
    tagged = torch.compiler.config.patch(cache_key_tag=tag)  # type: ignore[attr-defined]
    with tagged, _cacheable_random_state(options.inductor):
        return compile_fx(  # type: ignore[return-value]
            gm, list(example_inputs), config_patches=options.inductor
        )


def _lower_as_calls() -> None:
    """Tell Inductor that kernels are called as they are, with the layouts that it would choose.

    Where Inductor finds that out by itself it writes a log line with the arguments of the call, and
    in torch 2.11 spells them out, for whatever level is logged: with everything that they were
    computed from. Each residual sum in a kernel doubles that text, so that a decoder of 26 layers
    never ends (https://github.com/vllm-project/vllm/pull/43111 has the same for other operators).
    """
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint
    from torch._library.utils import get_layout_constraint_tag

    for op in library.kernels:
        if op not in lowerings:
            layouts = tag_to_layout_constraint(get_layout_constraint_tag(op))
            make_fallback(op, layout_constraint=layouts)


def _cacheable_random_state(patches: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """On a GPU, attention in an activation checkpoint counts as random, with dropout or without,
    and runs under an operator that restores the generator's state for the recomputation. torch has
    two such operators. It picks the graph-safe one, which torch 2.11 cannot cache
    (https://github.com/pytorch/pytorch/pull/185562), although only CUDA graphs need it."""
    from torch._inductor import config as inductor

    in_cuda_graphs = patches.get("triton.cudagraphs", inductor.triton.cudagraphs)
    if in_cuda_graphs or torch._prims.rng_prims.graphsafe_run_with_rng_state.cacheable():
        return contextlib.nullcontext()
    return torch._functorch.config.patch(graphsafe_rng_functionalization=False)


# -- the cache key ---------------------------------------------------------------------------------


def environment(rewrites: Sequence[Rewrite] = ()) -> str:
    """What decides, beside the options, what a graph becomes, and what the compile caches cannot
    see: they see the rewritten graph, but not the backward of an op
    (https://github.com/pytorch/pytorch/issues/144344). The versions of torch and Liger, and hashes
    over the source of liger_fx's ops and rewrites and of the files that define ``rewrites``."""
    own = sorted(_defined_in(r.replace) for r in rewrites)
    return ";".join([f"torch={torch.__version__}", _FINGERPRINT, *dict.fromkeys(own)])


@functools.cache
def _defined_in(function: Callable[..., Any]) -> str:
    """A hash of the file that defines ``function``, or of its code where there is no file."""
    try:
        source = Path(inspect.getfile(function)).read_bytes()
    except (OSError, TypeError):  # typed in, or no Python function
        source = getattr(getattr(function, "__code__", None), "co_code", b"")
    return f"{function.__module__}={hashlib.sha256(source).hexdigest()[:16]}"


def _own_fingerprint() -> str:
    folders = [Path(folder) for package in (ops, passes) for folder in package.__path__]
    source = b"".join(path.read_bytes() for f in folders for path in sorted(f.glob("*.py")))
    liger = version("liger_kernel")
    return f"liger_fx={hashlib.sha256(source).hexdigest()[:16]};liger_kernel={liger}"


_FINGERPRINT = _own_fingerprint()  # of what has just been imported: an editor may save later
