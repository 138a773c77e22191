"""torchtune's recipe of the same name, with every config and override that it takes::

    tune run liger_fx/recipes/knowledge_distillation_single_device \\
        --config qwen2/1.5_to_0.5B_KD_lora_single_device compile=True
"""

import sys

from liger_fx.torchtune import FusedKDRecipe, entry_point, load_recipe

stock = load_recipe("knowledge_distillation_single_device")


class KDRecipeSingleDevice(FusedKDRecipe, stock.KDRecipeSingleDevice):  # type: ignore[name-defined]
    """torchtune's distillation on one device, fused."""


recipe_main = entry_point(stock, KDRecipeSingleDevice)

if __name__ == "__main__":
    sys.exit(recipe_main())
