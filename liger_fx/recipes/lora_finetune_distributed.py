"""torchtune's recipe of the same name, with every config and override that it takes::

    tune run --nproc_per_node 2 liger_fx/recipes/lora_finetune_distributed \\
        --config llama3_2/1B_lora compile=True
"""

import sys

from liger_fx.torchtune import FusedRecipe, entry_point, load_recipe

stock = load_recipe("lora_finetune_distributed")


class LoRAFinetuneRecipeDistributed(
    FusedRecipe,
    stock.LoRAFinetuneRecipeDistributed,  # type: ignore[name-defined]
):
    """torchtune's LoRA, QLoRA and DoRA over several devices, fused."""


recipe_main = entry_point(stock, LoRAFinetuneRecipeDistributed)

if __name__ == "__main__":
    sys.exit(recipe_main())
