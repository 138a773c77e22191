"""What the nodes of a graph write to: schemas, conventions, bodies, and what only Dynamo counted."""

from __future__ import annotations

import operator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from _util import capture
from torch.utils.checkpoint import checkpoint

from liger_fx.effects import Effects, storage_key, written_values

X = torch.randn(3, 4)

_LIBRARY = torch.library.Library("test_effects", "FRAGMENT")
_LIBRARY.define("scale_second_(Tensor x, Tensor(a!) y) -> ()")
_LIBRARY.impl(
    "scale_second_", lambda x, y: y.mul_(2).size(0) < 0 or None, "CompositeExplicitAutograd"
)
_LIBRARY.impl("scale_second_", lambda x, y: None, "Meta")
scale_second_ = torch.ops.test_effects.scale_second_


@torch._dynamo.allow_in_graph
def users_own(x, y):
    return x + y


def effects_of(fn, *args):
    """The names of what each node of the graph writes to, and the effects of the graph."""
    (gm,) = capture(fn, *args, rewrites=[]).graphs
    named = {node.name: node for node in gm.graph.nodes}
    return named, Effects(gm.graph)


@pytest.mark.parametrize(
    ("write", "written"),
    [
        (lambda x, y: x.mul_(2), "x"),
        (lambda x, y: operator.iadd(x, y), "x"),
        (lambda x, y: x.__setitem__(0, 1.0), "x"),
        (lambda x, y: F.relu(x, inplace=True), "x"),
        (lambda x, y: F.dropout(x, 0.5, True, True), "x"),
        (lambda x, y: torch.add(x, y, out=y), "y"),
        (lambda x, y: torch.ops.aten.mul_.Tensor(x, y), "x"),
        (lambda x, y: torch.ops.aten.mul_(x, y), "x"),
        (lambda x, y: scale_second_(x, y), "y"),
        (lambda x, y: scale_second_.default(x, y), "y"),
        (lambda x, y: torch._foreach_mul_([x, y], 2.0), "x y"),
        (lambda x, y: users_own(x, y), "x y"),  # unknown means written
        (lambda x, y: F.batch_norm(x, y[0], y[1], training=True), "x getitem getitem_1"),
        (lambda x, y: F.batch_norm(x, y[0], y[1]), ""),
        (lambda x, y: F.instance_norm(x[None], y[0, :3], y[1, :3]), "getitem getitem_1 getitem_2"),
        (lambda x, y: x * y, ""),
        (lambda x, y: torch.max(x, y), ""),  # the second of an overload is `out`, by name only
        (lambda x, y: F.relu(x, inplace=False), ""),
        (lambda x, y: x.__add__(y), ""),
        (lambda x, y: torch.ops.aten.mul(x, y), ""),
        (lambda x, y: F.layer_norm(x, (4,)), ""),
        (lambda x, y: x.detach().to(torch.float64).sum(), ""),
    ],
)
def test_what_a_call_writes_to(write, written):
    def fn(x, y):
        x, y = x * 1, y * 1
        write(x, y)
        return x, y

    (gm,) = capture(fn, X, X, rewrites=[]).graphs
    targets = [n.name for node in gm.graph.nodes for n in written_values(node)]
    assert targets == written.split()


def test_a_body_writes_to_what_it_is_given():
    def fn(x, y):
        x, y = x * 1, y * 1
        checkpoint(lambda a: a.mul_(y), x, use_reentrant=False)
        checkpoint(lambda a: a * y, x, use_reentrant=False)
        return x, y

    named, effects = effects_of(fn, X, X)
    assert effects.written(named["x"]) and not effects.written(named["y"])
    (write,) = effects.writes[storage_key(named["x"])]
    assert "checkpoint" in str(write.target)
    assert not effects.hidden


def test_a_body_that_cannot_be_found_writes_to_everything():
    def fn(x, y):
        return checkpoint(torch.add, x, y, use_reentrant=False)

    (gm,) = capture(fn, X, X + 1, rewrites=[]).graphs
    (call,) = (n for n in gm.graph.nodes if "checkpoint" in str(n.target))
    with mock.patch("liger_fx.effects.bodies", return_value=[]):
        assert {n.name for n in written_values(call)} >= {"l_x_", "l_y_"}


def test_a_write_that_no_call_shows_is_hidden():
    def fn(tokens, weight, other):
        return F.embedding(tokens, weight, max_norm=1.0) @ other

    named, effects = effects_of(fn, torch.tensor([0]), X, torch.randn(4, 2))
    assert effects.hidden == {storage_key(named["l_weight_"])}
    assert effects.written(named["l_weight_"]) and not effects.written(named["l_other_"])


def test_a_hidden_write_beside_one_that_shows():
    def fn(tokens, weight):
        weight.mul_(2)
        return F.embedding(tokens, weight, max_norm=1.0)

    named, effects = effects_of(fn, torch.tensor([0]), X.clone())
    assert storage_key(named["l_weight_"]) in effects.hidden


def test_views_share_a_storage_key():
    def fn(x):
        y = x * 1
        return y, y.view(-1), y[0], y.transpose(0, 1), y + 0

    (gm,) = capture(fn, X, rewrites=[]).graphs
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    y, *views, copy = map(storage_key, output.args[0])
    assert set(views) == {y} and copy != y
