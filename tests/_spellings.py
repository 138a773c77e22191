"""Projection and loss as each library writes them: hidden state h, head w, labels y."""

from __future__ import annotations

import torch
import torch.nn.functional as F

B, S, H, V = 2, 6, 8, 13
T = 6  # a teacher's hidden size


def torchtune(h, w, y):
    logits = F.linear(h, w).float()
    y = torch.hstack((y[..., 1:], torch.full((B, 1), -100, device=y.device)))
    y, logits = y.reshape(-1), logits.reshape(-1, logits.size(-1))
    return torch.nn.CrossEntropyLoss()(logits, y)


def torchtune_chunked(h, w, y):
    logits = [F.linear(c, w) for c in h.chunk(3, dim=1)]
    total_elements = (y != -100).sum()
    y = [c.reshape(-1) for c in y.chunk(3, dim=1)]
    logits = [c.reshape(-1, c.size(-1)) for c in logits]
    total = 0.0
    for logits_chunk, labels_chunk in zip(logits, y, strict=True):
        total += F.cross_entropy(
            logits_chunk.float(), labels_chunk, ignore_index=-100, reduction="sum"
        )
    return total / total_elements


def torchtune_per_chunk(h, w, y):
    """compute_cross_entropy of the later LinearCrossEntropyLoss."""
    logits = F.linear(h, w)
    return F.cross_entropy(
        logits.reshape(-1, logits.size(-1)).float(),
        y.reshape(-1),
        ignore_index=-100,
        reduction="sum",
    )


def huggingface(h, w, y):
    logits = F.linear(h[:, slice(0, None), :], w)
    logits = logits.float()
    y = F.pad(y, (0, 1), value=-100)[..., 1:].contiguous()
    logits = logits.view(-1, V)
    return F.cross_entropy(
        logits, y.view(-1).to(logits.device), ignore_index=-100, reduction="mean"
    )


def huggingface_granite(h, w, y):
    logits = F.linear(h, w)
    logits = logits / 8.0
    return F.cross_entropy(logits.float().view(-1, V), y.view(-1))


def huggingface_cohere(h, w, y):
    logits = F.linear(h, w)
    logits = 0.0625 * logits
    return F.cross_entropy(logits.float().view(-1, V), y.view(-1))


def huggingface_gemma2(h, w, y):
    logits = F.linear(h, w)
    logits = logits / 30.0
    logits = torch.tanh(logits)
    logits = logits * 30.0
    return F.cross_entropy(logits.float().view(-1, V), y.view(-1))


def huggingface_shifted_logits(h, w, y):
    logits = F.linear(h, w).float()
    shift = logits[..., :-1, :].contiguous().view(-1, V)
    return F.cross_entropy(shift, y[..., 1:].contiguous().view(-1))


def nanochat(h, w, y):
    logits = F.linear(h, torch.cat([w, w[:3]]))  # its vocabulary is padded
    logits = logits[..., :V]
    logits = logits.float()
    logits = 15 * torch.tanh(logits / 15)
    targets = torch.where(y == -100, -1, y).view(-1)
    return F.cross_entropy(logits.view(-1, V), targets, ignore_index=-1, reduction="mean")


def padded_shifted_and_biased(h, w, y):
    logits = F.linear(h, torch.cat([w[:2], w, w[:3]]), torch.cat([w[:, 0], w[:5, 1]]))
    shift = logits[:, :-1, 2:-3].float().contiguous().view(-1, V)
    return F.cross_entropy(shift, y[:, 1:].contiguous().view(-1))


def torchtitan(h, w, y):
    return F.cross_entropy(F.linear(h, w).flatten(0, 1).float(), y.flatten(0, 1))


def sliced_after_flattening(h, w, y):
    return F.cross_entropy(F.linear(h, w).view(-1, V)[:-1], y.view(-1)[1:])


def classes_second(h, w, y):
    return F.cross_entropy(F.linear(h, w).transpose(1, 2), y, reduction="sum")


def smoothed(h, w, y):
    return F.cross_entropy(
        F.linear(h, w).view(-1, V),
        y.view(-1),
        label_smoothing=0.1,
        reduction="sum",
        ignore_index=-100,
    )


def other_ignore_index(h, w, y):
    return F.cross_entropy(F.linear(h, w).view(-1, V), y.view(-1).clamp_min(0), ignore_index=0)


def per_token(h, w, y):
    losses = F.cross_entropy(F.linear(h, w).float().view(-1, V), y.view(-1), reduction="none")
    return (losses * torch.linspace(0, 1, B * S, device=y.device)).sum()


def keyword_arguments(h, w, y):
    logits = F.linear(input=h, weight=w, bias=None)
    return F.cross_entropy(input=logits.view(-1, V), target=y.view(-1))


def one_token(h, w, y):
    return F.cross_entropy(F.linear(h[0, 0], w), y[0, 3])


def linear_cross_entropy(h, w, y):
    return F.linear_cross_entropy(h.view(-1, H), w, y.view(-1))


SPELLINGS = [
    torchtune, torchtune_chunked, torchtune_per_chunk, huggingface,
    huggingface_granite, huggingface_cohere, huggingface_gemma2,
    huggingface_shifted_logits, nanochat, padded_shifted_and_biased, torchtitan, sliced_after_flattening, classes_second, smoothed,
    other_ignore_index, per_token, keyword_arguments, one_token,
    *([linear_cross_entropy] if hasattr(F, "linear_cross_entropy") else []),
]  # fmt: skip
