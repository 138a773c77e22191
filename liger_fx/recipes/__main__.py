"""Where ``tune run liger_fx.recipes.<recipe>`` ends: tune takes what follows the last dot for the
suffix of a file."""

import sys
from pathlib import Path

known = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("_"))
sys.exit(
    "Write the recipe as a path, `tune run liger_fx/recipes/<recipe> --config ...`, with one of:\n"
    + "\n".join(f"  liger_fx/recipes/{name}" for name in known)
)
