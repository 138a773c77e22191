"""A rewrite of your own: a pattern, a check, a replacement. Here: squared ReLU as one op."""

import torch
import torch.nn.functional as F

import liger_fx


@torch.library.custom_op("example::relu_squared", mutates_args=())
def relu_squared(x: torch.Tensor) -> torch.Tensor:
    return x.clamp_min(0).square_()


@relu_squared.register_fake
def _(x):
    return torch.empty_like(x)


def primer(x):
    return F.relu(x) ** 2


def check(match, x):
    if x.requires_grad:
        raise liger_fx.Reject("example::relu_squared has no backward")


rewrite = liger_fx.Rewrite(
    name="relu_squared",
    patterns=[primer],
    check=check,
    replace=lambda match, x: relu_squared(x),
)


def backend(gm, example_inputs):
    print(liger_fx.rewrite_graph(gm, [rewrite]))
    return gm.forward


mlp = torch.compile(lambda x, w: (torch.relu(x @ w)).pow(2), backend=backend)
x, w = torch.randn(4, 8), torch.randn(8, 8)
torch.testing.assert_close(mlp(x, w), (x @ w).relu().square())
mlp(x, w.requires_grad_())
