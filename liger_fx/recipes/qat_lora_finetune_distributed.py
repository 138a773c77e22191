"""torchtune's recipe of the same name, with every config and override that it takes::

    tune run --nproc_per_node 2 liger_fx/recipes/qat_lora_finetune_distributed \\
        --config llama3_2/1B_qat_lora compile=True
"""

import sys

from liger_fx.torchtune import FusedQATRecipe, entry_point, load_recipe

stock = load_recipe("qat_lora_finetune_distributed")


class QATLoRAFinetuneRecipeDistributed(
    FusedQATRecipe,
    stock.QATLoRAFinetuneRecipeDistributed,  # type: ignore[name-defined]
):
    """torchtune's quantisation-aware training with LoRA, fused."""


recipe_main = entry_point(stock, QATLoRAFinetuneRecipeDistributed)

if __name__ == "__main__":
    sys.exit(recipe_main())
