"""RMSNorm as each library writes it: input x, weight w."""

from __future__ import annotations

import torch
import torch.nn.functional as F

H, EPS = 24, 1e-5


def torchtune(x, w):
    return F.rms_norm(x.float(), normalized_shape=(x.shape[-1],), weight=w, eps=EPS).to(x.dtype)


def torchtitan(x, w):
    return F.rms_norm(x, (x.shape[-1],), w, EPS)


def no_eps(x, w):
    return torch.rms_norm(x, (x.shape[-1],), w)


def torchtune_gemma(x, w):
    x_fp32 = x.float()
    normed = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * (1.0 + w.float())).type_as(x)


def huggingface(x, w):
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + EPS)
    return w * x.to(dtype)


def meta_llama(x, w):
    f = x.float()
    return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)).type_as(x) * w


def lit_gpt(x, w):
    dtype, x = x.dtype, x.float()
    normed = x * torch.rsqrt(torch.mean(x * x, dim=-1, keepdim=True) + EPS)
    return normed.to(dtype=dtype) * w


def olmo(x, w):
    f = x.to(torch.float32)
    f = f * torch.rsqrt(f.square().mean(-1, keepdim=True) + EPS)
    return (w.float() * f).to(x.dtype)


def gpt_oss(x, w):
    f = x.to(torch.float32)
    f = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)
    return (w * f).to(x.dtype)


def gemma4(x, w):
    f = x.float()
    mean_squared = f.pow(2).mean(-1, keepdim=True) + EPS
    return (f * torch.pow(mean_squared, -0.5) * w.float()).type_as(x)


SPELLINGS = [
    torchtune,
    torchtitan,
    no_eps,
    torchtune_gemma,
    huggingface,
    meta_llama,
    lit_gpt,
    olmo,
    gpt_oss,
    gemma4,
]


def exact(spelling):
    """The formula of ``spelling``, without a cast."""
    eps = torch.finfo(torch.float32).eps if spelling is no_eps else EPS
    offset = 1.0 if spelling is torchtune_gemma else 0.0
    return lambda x, w: x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (w + offset)
