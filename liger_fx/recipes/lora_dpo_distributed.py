"""torchtune's recipe of the same name, with every config and override that it takes::

    tune run --nproc_per_node 2 liger_fx/recipes/lora_dpo_distributed \\
        --config llama3_1/8B_lora_dpo compile=True
"""

import sys

from liger_fx.torchtune import FusedDPORecipe, entry_point, load_recipe

stock = load_recipe("lora_dpo_distributed")


class LoRADPORecipeDistributed(
    FusedDPORecipe,
    stock.LoRADPORecipeDistributed,  # type: ignore[name-defined]
):
    """torchtune's DPO with LoRA over several devices, fused."""


recipe_main = entry_point(stock, LoRADPORecipeDistributed)

if __name__ == "__main__":
    sys.exit(recipe_main())
