"""RMSNorm as each library writes it, and what `rms_norm` and `add_rms_norm` ask of it.

Each function says in its name whom it serves, and in `CASTING` how it rounds: "gemma" once, at the
end; "llama" before the product with the weight as well.
"""

from typing import Any

import torch

from liger_fx.canonical import hint, same_sizes, specialise
from liger_fx.matcher import Match, Reject
from liger_fx.pattern import guard

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_COLUMNS = 65536  # of a row, which Liger's kernels hold as a whole


def torchtune(x, normalized_shape, weight, eps):
    return torch.rms_norm(x.float(), normalized_shape, weight, eps).to(x.dtype)


def torch_module(x, normalized_shape, weight, eps):
    """nn.RMSNorm, as torchtitan uses it: computed in fp32, rounded once, by torch itself."""
    return torch.rms_norm(x, normalized_shape, weight, eps)


def gemma(x, weight, eps):
    return (_normalised(x, eps) * (1.0 + weight.float())).to(x.dtype)


# Of two norms without weights, one after the other, the second's factor is no weight of the first.
_weight = guard("a weight", lambda value: value.dim() < 2 or str(value.shape[-1]) != "1")


def huggingface(x, weight, eps):
    return _weight(weight) * _normalised(x, eps).to(x.dtype)


def olmo(x, weight, eps):
    return (_weight(weight).float() * _normalised(x, eps)).to(x.dtype)


def olmo_promoted(x, weight, eps):
    """Of a narrower weight, which the product widens."""
    return (_weight(weight) * _normalised(x, eps)).to(x.dtype)


def _normalised(x, eps):
    f = x.float()
    return f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)


def unweighted(x, eps):
    return _normalised(x, eps).to(x.dtype)


def unweighted_rounded(x, eps):
    """DeepSeek-V4's: the factor is rounded, then the product. The op rounds the product alone."""
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps).to(x.dtype)


CASTING = {
    "torchtune": "gemma",
    "torch_module": "gemma",
    "gemma": "gemma",
    "huggingface": "llama",
    "olmo": "gemma",
    "olmo_promoted": "gemma",
    "unweighted": "gemma",
    "unweighted_rounded": "gemma",
}


def literals(match: Match) -> tuple[float, float, str]:
    """(eps, offset, casting) of the ops."""
    name, eps = match.pattern.name.removeprefix("add_"), match.values["eps"]
    if eps is None:  # torch.rms_norm's default, of the dtype that it computes in
        eps = torch.finfo(torch.float32).eps
    return specialise(eps), 1.0 if name == "gemma" else 0.0, CASTING[name]


def check_norm(match: Match, x: Any, weight: Any, eps: Any, normalized_shape: Any) -> None:
    """Raise `Reject` for a norm that Liger's kernel does not compute, or not the same."""
    if normalized_shape is not None and len(normalized_shape) != 1:
        raise Reject(f"it normalises {len(normalized_shape)} dimensions; the kernel takes the last")
    if weight is not None and not isinstance(weight, torch.Tensor):
        raise Reject(f"the weight is a number, {weight!r}; the kernel takes a tensor or none")
    if weight is not None and weight.dim() != 1:
        raise Reject(f"the weight is {weight.dim()}-D, expected 1-D [columns]")
    if weight is not None and not same_sizes(weight.shape, x.shape[-1:]):
        raise Reject(
            f"the weight is {list(weight.shape)}, expected {list(x.shape[-1:])}: the product "
            "broadcasts, the kernel reads one weight for each column"
        )
    if weight is not None and weight.dtype not in DTYPES:
        raise Reject(f"the weight is {weight.dtype}; the kernel computes in float32")
    if eps is not None and hint(eps) is None:
        raise Reject("eps is computed in the graph, expected a constant")
    check_rows(match, x)


def as_eager_reads(match: Match, x: Any) -> Any:
    """The proxy ``x``, or a contiguous copy of x where eager's result is contiguous and x is not:
    there torch's own norms copy first, so that their gradient of the copy is contiguous as well."""
    copies = match.output.is_contiguous() and not match.values["x"].is_contiguous()
    return x.contiguous() if copies else x


def check_rows(match: Match, x: torch.Tensor) -> None:
    if x.dtype not in DTYPES:
        raise Reject(f"the input is {x.dtype}; the kernel computes in float32")
    if match.output.dtype != x.dtype:
        raise Reject(
            f"the output is {match.output.dtype}, the input {x.dtype}; the kernel writes the "
            "input's dtype (autocast, or a weight of another dtype?)"
        )
    check_columns(x)


def check_columns(x: torch.Tensor) -> None:
    columns = x.shape[-1] if x.dim() else 1
    if isinstance(columns, int) and columns > MAX_COLUMNS:
        raise Reject(f"a row has {columns} elements; the kernel takes at most {MAX_COLUMNS}")
