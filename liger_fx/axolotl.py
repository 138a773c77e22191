"""Axolotl: in its configuration file ``plugins: [liger_fx.axolotl.LigerFxPlugin]``.

Axolotl hands ``torch_compile_backend`` to accelerate, which takes only the names that it lists.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin

from liger_fx.huggingface import LigerFxCallback


class LigerFxPlugin(BasePlugin):
    """Compiles the model, adapters included, with liger_fx when the trainer is made.

    Options come from the environment (``LIGER_FX_POLICY=all``). Raises ValueError under
    ``torch_compile``, which would compile the model again, with Inductor, and hide errors.
    """

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[LigerFxCallback]:
        if cfg.torch_compile:
            raise ValueError(
                "torch_compile is set beside LigerFxPlugin, which compiles the model itself; "
                "leave torch_compile out"
            )
        return [LigerFxCallback()]
