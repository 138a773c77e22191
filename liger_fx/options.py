"""Options: from ``torch.compile(options=...)`` and from ``LIGER_FX_*`` variables."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

POLICIES = ("auto", "measure", "all")
INNER = ("inductor", "aot_eager", "eager")


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
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    inductor: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def parse(
        given: Mapping[str, Any] | None,
        known: Mapping[str, Mapping[str, Any]],
        environ: Mapping[str, str] = os.environ,
    ) -> Options:
        """Read ``given`` over the environment. known: the settings of each rewrite, by its name.

        Raises ValueError, listing what is known, for a name or a value that is not.
        """
        parser = _Parser(known)
        for name, text in environ.items():
            if name.startswith("LIGER_FX_"):
                parser.environment(name, text)
        for key, value in (given or {}).items():
            parser.option(key, value)
        return parser.options()


_OURS = tuple(f.name for f in fields(Options) if f.name not in ("settings", "inductor"))


class _Parser:
    def __init__(self, known: Mapping[str, Mapping[str, Any]]) -> None:
        self.known = known
        self.dotted = {f"{r}.{s}": default for r, ss in known.items() for s, default in ss.items()}
        self.values: dict[str, Any] = {}
        self.settings: dict[str, dict[str, Any]] = {}
        self.inductor: dict[str, Any] = {}

    def environment(self, variable: str, text: str) -> None:
        names = {f"LIGER_FX_{n.replace('.', '_').upper()}": n for n in (*_OURS, *self.dotted)}
        if variable not in names:
            raise ValueError(
                f"unknown environment variable {variable}; known are {', '.join(sorted(names))}"
            )
        self.option(names[variable], text)

    def option(self, key: str, value: Any) -> None:
        if key in _OURS:
            self.values[key] = getattr(self, f"_{key}", self._names)(key, value)
        elif key in self.dotted:
            rewrite, setting = key.split(".", 1)
            chosen = self.settings.setdefault(rewrite, {})
            chosen[setting] = _like(key, self.dotted[key], value)
        elif key.split(".", 1)[0] in self.known or not _is_inductor_key(key):
            ours = ", ".join([*_OURS, *self.dotted])
            raise ValueError(
                f"unknown option {key!r}; liger_fx knows {ours}, and every key of "
                "torch._inductor.config"
            )
        else:
            self.inductor[key] = value

    def options(self) -> Options:
        options = Options(**self.values, settings=self.settings, inductor=self.inductor)
        if options.inductor and options.inner != "inductor":
            raise ValueError(
                f"{', '.join(options.inductor)} are Inductor options, but inner={options.inner!r}"
            )
        return options

    def _policy(self, key: str, value: Any) -> str | tuple[str, ...]:
        if value in POLICIES:
            return value
        try:
            return self._names(key, value)
        except ValueError as unknown:
            raise ValueError(f"{unknown}. A {key} is {', '.join(POLICIES)} or such names") from None

    def _strict(self, key: str, value: Any) -> bool:
        return _like(key, False, value)

    def _inner(self, key: str, value: Any) -> str:
        if value not in INNER:
            raise ValueError(f"inner is one of {', '.join(INNER)}, not {value!r}")
        return value

    def _names(self, key: str, value: str | Sequence[str]) -> tuple[str, ...]:
        names = tuple(n for n in value.split(",") if n) if isinstance(value, str) else tuple(value)
        for name in names:
            if name not in self.known:
                raise ValueError(f"{key}: no rewrite {name!r}; known are {', '.join(self.known)}")
        return names


def _like(key: str, default: Any, value: Any) -> Any:
    """``value`` in the type of ``default``; environment variables are text."""
    if isinstance(value, str) and isinstance(default, bool):
        if value.lower() not in ("0", "1", "false", "true"):
            raise ValueError(f"{key} is true or false, not {value!r}")
        return value.lower() in ("1", "true")
    if isinstance(default, torch.dtype):
        dtype = getattr(torch, value, None) if isinstance(value, str) else value
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{key} is a dtype such as 'float32' or 'bfloat16', not {value!r}")
        return dtype
    try:
        converted = type(default)(value)
    except (TypeError, ValueError):
        converted = None
    if converted is None or (not isinstance(value, str) and converted != value):
        raise ValueError(f"{key} takes {type(default).__name__}, not {value!r}")
    return converted


def _is_inductor_key(key: str) -> bool:
    from torch._inductor import config

    return key.replace("-", "_") in config.get_config_copy()
