"""torchtune's recipe of the same name, with every config and override that it takes::

    tune run --nproc_per_node 2 liger_fx/recipes/qat_distributed \\
        --config llama3/8B_qat_full compile=True
"""

import sys

from liger_fx.torchtune import FusedQATRecipe, entry_point, load_recipe

stock = load_recipe("qat_distributed")


class QATRecipeDistributed(
    FusedQATRecipe,
    stock.QATRecipeDistributed,  # type: ignore[name-defined]
):
    """torchtune's quantisation-aware training, fused."""


recipe_main = entry_point(stock, QATRecipeDistributed)

if __name__ == "__main__":
    sys.exit(recipe_main())
