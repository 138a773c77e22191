"""Options: from ``torch.compile(options=...)`` and from ``LIGER_FX_*`` variables."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

# What Dynamo hands on to the user as it is (torch/_dynamo/output_graph.py: _call_user_compiler).
from torch._dynamo.exc import ShortenTraceback

POLICIES = ("auto", "measure", "all")
INNER = ("inductor", "aot_eager", "eager")
LOGITS = ("on_demand", "keep")


class ForTheUser(ShortenTraceback):
    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


class OptionError(ForTheUser, ValueError):
    """An option is unknown, has no such value, or cannot apply together with another."""


@dataclass(frozen=True)
class Options:
    """What a user can choose.

    policy: "auto" applies what the table of measurements says pays on the device, "measure" what
        pays in this graph, timed at its first compile; "all" every legal rewrite, a list of names
        just these.
    disable: rewrites never to apply.
    require: rewrites that must have been applied, in this graph or in an earlier one of the same
        compiled function; else compiling raises. Graphs belong to one function if they are compiled
        with the same ``options=`` object. From the environment, all graphs of the process count.
    strict: raise on an unexpected engine error instead of leaving out the match that caused it.
    inner: the compiler of the rewritten graph: "inductor", "aot_eager" or "eager".
    logits: of a model that returns them beside its loss: "on_demand" computes them when they are
        read (`liger_fx.DeferredLogits`), "keep" in the graph, which keeps the head from being
        fused.
    table: a file that ``python -m liger_fx measure --write FILE`` has made, which "auto" reads
        beside the shipped table; "" for the one in the user's cache directory, if there is one.
    settings: ``{rewrite: {setting: value}}``, spelled ``<rewrite>.<setting>``.
    inductor: all other keys, handed to Inductor.

    An option in ``options=`` wins over its environment variable: ``LIGER_FX_POLICY``,
    ``LIGER_FX_DISABLE=rope,swiglu``, ``LIGER_FX_LINEAR_CROSS_ENTROPY_CHUNK_TOKENS=2048``.
    """

    policy: str | tuple[str, ...] = "auto"
    disable: tuple[str, ...] = ()
    require: tuple[str, ...] = ()
    strict: bool = False
    inner: str = "inductor"
    logits: str = "on_demand"
    table: str = ""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    inductor: dict[str, Any] = field(default_factory=dict)


_OURS = tuple(f.name for f in fields(Options) if f.name not in ("settings", "inductor"))


def parse(
    given: Mapping[str, Any] | None,
    known: Mapping[str, Mapping[str, Any]],
    environ: Mapping[str, str] = os.environ,
) -> Options:
    """Read ``given`` over the environment. known: the settings of each rewrite, by its name.

    Raises OptionError, a ValueError, listing what is known, for a name or a value that is not.
    """
    defaults = {f"{r}.{s}": default for r, ss in known.items() for s, default in ss.items()}
    ours: dict[str, Any] = {}
    settings: dict[str, dict[str, Any]] = {}
    inductor: dict[str, Any] = {}
    for key, value in {**_from(environ, (*_OURS, *defaults)), **(given or {})}.items():
        rewrite, _, setting = key.partition(".")
        if key in _OURS:
            ours[key] = _value(key, value, known)
        elif key in defaults:
            settings.setdefault(rewrite, {})[setting] = _like(key, defaults[key], value)
        elif rewrite in known or not _is_inductor_key(key):
            raise OptionError(
                f"unknown option {key!r}; liger_fx knows {', '.join((*_OURS, *defaults))}, and "
                "every key of torch._inductor.config"
            )
        else:
            inductor[key] = value
    options = Options(**ours, settings=settings, inductor=inductor)
    if inductor and options.inner != "inductor":
        raise OptionError(
            f"{', '.join(inductor)} are Inductor options, given by name or by mode=, but "
            f"inner={options.inner!r}: leave out one of the two"
        )
    return options


def _from(environ: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    variables = {f"LIGER_FX_{name.replace('.', '_').upper()}": name for name in names}
    found = {
        variable: text for variable, text in environ.items() if variable.startswith("LIGER_FX_")
    }
    for variable in found.keys() - variables.keys():
        raise OptionError(
            f"unknown environment variable {variable}; known are {', '.join(sorted(variables))}"
        )
    return {variables[variable]: text for variable, text in found.items()}


def _value(key: str, value: Any, known: Collection[str]) -> Any:
    """The value of an option that is not a rewrite's."""
    if key in ("strict", "table"):
        return _like(key, getattr(Options, key), value)
    choices = {"inner": INNER, "policy": POLICIES, "logits": LOGITS}.get(key, ())
    if isinstance(value, str) and value in choices:
        return value
    if choices and key != "policy":
        raise OptionError(f"{key} is one of {', '.join(choices)}, not {value!r}")
    names = tuple(n for n in value.split(",") if n) if isinstance(value, str) else tuple(value)
    for name in names:
        if name not in known:
            also = f"; or one of {', '.join(choices)}" if choices else ""
            raise OptionError(f"{key}: no rewrite {name!r}; known are {', '.join(known)}{also}")
    return names


def _like(key: str, default: Any, value: Any) -> Any:
    """``value`` in the type of ``default``; environment variables are text."""
    if isinstance(value, str) and isinstance(default, bool):
        value = {"0": False, "false": False, "1": True, "true": True}.get(value.lower(), value)
    if isinstance(value, str) and isinstance(default, torch.dtype):
        value = getattr(torch, value, value)
    if type(default) in (int, float) and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError):
            number = type(default)(value)
            value = number if isinstance(value, str) or number == value else value
    if type(value) is not type(default):
        wanted = _EXAMPLES.get(type(default), type(default).__name__)
        raise OptionError(f"{key} takes {wanted}, not {value!r}")
    return value


_EXAMPLES = {bool: "true or false", torch.dtype: "a dtype such as 'float32' or 'bfloat16'"}


def _is_inductor_key(key: str) -> bool:
    from torch._inductor import config

    return key.replace("-", "_") in config.get_config_copy()
