"""A rewrite of your own: a pattern, a check, a replacement. Here: squared ReLU as one op, trained
through Inductor with the rewrites, the policy, the caches and the report of liger_fx."""

import torch
import torch.nn.functional as F
from liger_fx.passes import DEFAULT

import liger_fx


@torch.library.custom_op("example::relu_squared", mutates_args=())
def relu_squared(x: torch.Tensor) -> torch.Tensor:
    return x.clamp_min(0).square_()


@relu_squared.register_fake
def _(x):
    return torch.empty_like(x)


def keep_input(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, grad):
    (x,) = ctx.saved_tensors
    return 2 * x.clamp_min(0) * grad


relu_squared.register_autograd(backward, setup_context=keep_input)


def primer(x):
    return F.relu(x) ** 2


def check(match, x):
    if x.dtype == torch.float64:
        raise liger_fx.Reject("example::relu_squared is not for float64")


rewrite = liger_fx.Rewrite(
    name="relu_squared",
    patterns=[primer],
    check=check,
    replace=lambda match, x: relu_squared(x),
    saved=["x"],
)


def step(x, w, head, labels):
    return F.cross_entropy(F.linear(torch.relu(x @ w).pow(2), head), labels)


compiled = torch.compile(step, backend=liger_fx.backend([*DEFAULT, rewrite]))
x, labels = torch.randn(4, 8), torch.randint(0, 16, (4,))
w, head = torch.randn(8, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
gradients = torch.autograd.grad(compiled(x, w, head, labels), (w, head))
expected = torch.autograd.grad(step(x, w, head, labels), (w, head))
torch.testing.assert_close(gradients, expected)
print(liger_fx.reports()[-1])
