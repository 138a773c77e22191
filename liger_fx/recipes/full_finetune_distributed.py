"""torchtune's recipe of the same name, with every config and override that it takes::

    tune run --nproc_per_node 2 liger_fx/recipes/full_finetune_distributed \\
        --config llama3_2/1B_full compile=True
"""

import sys

from liger_fx.torchtune import FusedRecipe, entry_point, load_recipe

stock = load_recipe("full_finetune_distributed")


class FullFinetuneRecipeDistributed(
    FusedRecipe,
    stock.FullFinetuneRecipeDistributed,  # type: ignore[name-defined]
):
    """torchtune's full fine-tuning over several devices, fused."""


recipe_main = entry_point(stock, FullFinetuneRecipeDistributed)

if __name__ == "__main__":
    sys.exit(recipe_main())
