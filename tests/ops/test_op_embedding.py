"""``liger_fx::embedding``, against fp64 and against eager."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from _op_checks import Case, Contract, randn
from _util import DEVICE

from liger_fx import ops


def embedding(weight, indices, padding_idx, scale_grad_by_freq):
    padding_idx = None if padding_idx < 0 else padding_idx
    return F.embedding(indices, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq)


def weight_and_indices(shape, dtype, generator, *, index=torch.int64):
    size = (3, shape[0] // 2 + 2)
    indices = torch.randint(shape[0], size, generator=generator, device=generator.device)
    return [randn(shape, dtype, generator), indices.to(index)]


def case(name, padding_idx=-1, scale_grad_by_freq=False, **options):
    make = functools.partial(weight_and_indices, **options)
    literals = (padding_idx, scale_grad_by_freq)
    return Case(name, ops.embedding, embedding, make, literals, shape=(53, 48))


class TestEmbedding(Contract):
    CASES = (
        case("lookup"),
        case("padding", padding_idx=0),
        case("by frequency", scale_grad_by_freq=True),
        case("32 bits", index=torch.int32),
    )
    SHAPES = ((1, 257), (7, 5), (33, 48), (3, 4099), (10_003, 5))
    BIG = (1_100_000, 2048)
    KERNELS = 1  # the lookup is torch's

    @pytest.mark.gpu
    def test_more_than_two_billion_elements(self, first_case):  # A28
        if torch.cuda.mem_get_info()[0] < 16 << 30:  # table, gradient, and where that is not zero
            pytest.skip("needs 16 GiB")
        rows = self.BIG[0]
        weight = torch.randn(self.BIG, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        indices = torch.tensor([0, 1, rows - 2, rows - 1, rows - 1], device=DEVICE)
        out = first_case.fused(weight, indices)
        assert torch.equal(out, weight[indices])
        (gradient,) = torch.autograd.grad(out.float().sum(), weight)
        assert gradient[indices.unique(), 0].tolist() == [1, 1, 1, 2]
        assert gradient.count_nonzero() == 4 * self.BIG[1]


@pytest.mark.skipif(DEVICE != "cpu", reason="on CUDA it is a device-side assertion")
@pytest.mark.parametrize("index", [53, -1])
def test_indices_out_of_range_are_an_error(index):  # A29
    weight, indices = TestEmbedding.CASES[0].make()
    indices[0, 0] = index
    with pytest.raises(IndexError, match="out of range"):
        ops.embedding(weight, indices)
