"""What the program around the graphs leaves out, where one can tell: torchtune's stock recipes."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

RECIPES = Path(__file__).parent.parent / "recipes"


@functools.cache
def advice() -> str | None:
    """A sentence for a process that runs a stock torchtune recipe of which liger_fx has its own
    form, told by the file that was started; None anywhere else. torchtune is not imported."""
    started = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    beside = started.parent.parent / "torchtune" / "__init__.py"
    if not (started.parent.name == "recipes" and beside.exists()):
        return None
    name, ours = started.stem, RECIPES / started.name
    if started == ours or not ours.exists():  # ours has a `torchtune` beside it as well
        return None
    apart = f"torchtune's {name} runs the output projection eagerly, outside of what it compiles"
    fused = f"`tune run liger_fx/recipes/{name}` with the same arguments"
    return f"{apart}, so projection and loss cannot be one op; {fused} makes them one"
