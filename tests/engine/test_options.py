"""Options from ``options=`` and from the environment, and what is asked of a compiled function."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _programs import V, head_inputs, loss_of, norm
from expecttest import assert_expected_inline
from torch import Tensor

import liger_fx
from liger_fx import options
from liger_fx.options import Options

KNOWN = {
    "linear_cross_entropy": {
        "chunk_tokens": 0,
        "accum_dtype": torch.float32,
        "skip_ignored": True,
    },
    "rope": {},
}


def parse(given=None, **environ):
    return options.parse(given, KNOWN, environ)


def error(given=None, **environ):
    with pytest.raises(ValueError) as raised:
        parse(given, **environ)
    return str(raised.value)


def test_defaults():
    assert parse() == Options()


def test_options_win_over_the_environment():
    environ = {"LIGER_FX_POLICY": "all", "LIGER_FX_DISABLE": "rope", "LIGER_FX_STRICT": "1"}
    options = parse({"policy": ["rope"]}, **environ)
    assert (options.policy, options.disable, options.strict) == (("rope",), ("rope",), True)


def test_settings_of_a_rewrite():
    environ = {"LIGER_FX_LINEAR_CROSS_ENTROPY_CHUNK_TOKENS": "512"}
    given = {
        "linear_cross_entropy.skip_ignored": False,
        "linear_cross_entropy.accum_dtype": "bfloat16",
    }
    assert parse(given, **environ).settings == {
        "linear_cross_entropy": {
            "chunk_tokens": 512,
            "skip_ignored": False,
            "accum_dtype": torch.bfloat16,
        }
    }


def test_other_keys_go_to_inductor():
    assert parse({"triton.cudagraphs": True, "max_autotune": True}).inductor == {
        "triton.cudagraphs": True,
        "max_autotune": True,
    }


def test_errors_list_what_is_known():
    assert_expected_inline(
        error({"polcy": "all"}),
        """unknown option 'polcy'; liger_fx knows policy, disable, require, strict, inner, logits, table, linear_cross_entropy.chunk_tokens, linear_cross_entropy.accum_dtype, linear_cross_entropy.skip_ignored, and every key of torch._inductor.config""",
    )
    assert_expected_inline(
        error({"linear_cross_entropy.chunks": 8}),
        """unknown option 'linear_cross_entropy.chunks'; liger_fx knows policy, disable, require, strict, inner, logits, table, linear_cross_entropy.chunk_tokens, linear_cross_entropy.accum_dtype, linear_cross_entropy.skip_ignored, and every key of torch._inductor.config""",
    )
    assert_expected_inline(
        error(LIGER_FX_POLCY="all"),
        """unknown environment variable LIGER_FX_POLCY; known are LIGER_FX_DISABLE, LIGER_FX_INNER, LIGER_FX_LINEAR_CROSS_ENTROPY_ACCUM_DTYPE, LIGER_FX_LINEAR_CROSS_ENTROPY_CHUNK_TOKENS, LIGER_FX_LINEAR_CROSS_ENTROPY_SKIP_IGNORED, LIGER_FX_LOGITS, LIGER_FX_POLICY, LIGER_FX_REQUIRE, LIGER_FX_STRICT, LIGER_FX_TABLE""",
    )
    assert_expected_inline(
        error({"disable": "rms_norm"}),
        """disable: no rewrite 'rms_norm'; known are linear_cross_entropy, rope""",
    )
    assert_expected_inline(
        error({"inner": "nvfuser"}), """inner is one of inductor, aot_eager, eager, not 'nvfuser'"""
    )
    assert_expected_inline(
        error({"strict": "maybe"}), """strict takes true or false, not 'maybe'"""
    )
    assert_expected_inline(
        error({"linear_cross_entropy.chunk_tokens": 1.5}),
        """linear_cross_entropy.chunk_tokens takes int, not 1.5""",
    )
    assert_expected_inline(
        error({"linear_cross_entropy.accum_dtype": "fp8"}),
        """linear_cross_entropy.accum_dtype takes a dtype such as 'float32' or 'bfloat16', not 'fp8'""",
    )
    assert_expected_inline(
        error({"inner": "eager", "max_autotune": True}),
        """max_autotune are Inductor options, given by name or by mode=, but inner='eager': leave out one of the two""",
    )


# -- C13: options that cannot apply, requirements that are not met -----------------------------------


def test_what_another_function_met_is_not_met_by_this_one():
    inputs = head_inputs()
    options = {"require": ["linear_cross_entropy"], "inner": "eager"}
    torch.compile(loss_of, backend="liger_fx", options=dict(options))(*inputs)
    assert liger_fx.reports()[-1].counts == {"linear_cross_entropy": 1}

    def reads_logits(h: Tensor, w: Tensor, y: Tensor) -> Any:
        logits = F.linear(h, w)
        return F.cross_entropy(logits.view(-1, V), y.view(-1)), logits.argmax(-1)

    with pytest.raises(Exception, match="required but not made: linear_cross_entropy"):
        torch.compile(reads_logits, backend="liger_fx", options=dict(options))(*inputs)


def test_what_a_function_met_in_one_graph_is_met_in_its_others():
    """A graph break leaves a second graph, with a loss that cannot be fused, in one function."""

    def step(h: Tensor, w: Tensor, y: Tensor) -> Any:
        loss = loss_of(h, w, y)
        torch._dynamo.graph_break()
        return loss, norm(h, w[0])

    options = {"require": ["linear_cross_entropy"], "inner": "eager"}
    torch.compile(step, backend="liger_fx", options=options)(*head_inputs())
    assert len(liger_fx.reports()) == 2


WITHOUT_INDUCTOR = pytest.mark.parametrize("inner", ["aot_eager", "eager"])


@WITHOUT_INDUCTOR
def test_a_mode_needs_its_compiler(inner):
    """torch.compile takes either mode or options; who calls the backend may give both."""
    backend = functools.partial(liger_fx.liger_fx, mode="max-autotune", options={"inner": inner})
    with pytest.raises(Exception, match=r"(?s)mode.*inner|inner.*mode"):
        torch.compile(loss_of, backend=backend)(*head_inputs())


@WITHOUT_INDUCTOR
def test_a_mode_needs_the_compiler_of_the_environment(inner, monkeypatch):
    monkeypatch.setenv("LIGER_FX_INNER", inner)
    compiled = torch.compile(loss_of, backend="liger_fx", mode="max-autotune")
    with pytest.raises(Exception, match=r"(?s)mode.*inner|inner.*mode"):
        compiled(*head_inputs())
