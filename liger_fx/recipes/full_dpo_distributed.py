"""torchtune's recipe of the same name, with every config and override that it takes::

    tune run --nproc_per_node 2 liger_fx/recipes/full_dpo_distributed \\
        --config llama3_1/8B_full_dpo compile=True
"""

import sys

from liger_fx.torchtune import FusedDPORecipe, entry_point, load_recipe

stock = load_recipe("full_dpo_distributed")


class FullDPORecipeDistributed(
    FusedDPORecipe,
    stock.FullDPORecipeDistributed,  # type: ignore[name-defined]
):
    """torchtune's DPO over several devices, fused."""


recipe_main = entry_point(stock, FullDPORecipeDistributed)

if __name__ == "__main__":
    sys.exit(recipe_main())
