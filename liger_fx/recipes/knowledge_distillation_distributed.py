"""torchtune's recipe of the same name, with every config and override that it takes::

    tune run --nproc_per_node 2 liger_fx/recipes/knowledge_distillation_distributed \\
        --config qwen2/1.5_to_0.5B_KD_lora_distributed compile=True
"""

import sys

from liger_fx.torchtune import FusedKDRecipe, entry_point, load_recipe

stock = load_recipe("knowledge_distillation_distributed")


class KDRecipeDistributed(FusedKDRecipe, stock.KDRecipeDistributed):  # type: ignore[name-defined]
    """torchtune's distillation over several devices, fused."""


recipe_main = entry_point(stock, KDRecipeDistributed)

if __name__ == "__main__":
    sys.exit(recipe_main())
