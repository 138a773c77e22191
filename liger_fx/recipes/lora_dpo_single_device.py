"""torchtune's recipe of the same name, with every config and override that it takes::

    tune run liger_fx/recipes/lora_dpo_single_device \\
        --config llama3_1/8B_lora_dpo_single_device compile=True
"""

import sys

from liger_fx.torchtune import FusedDPORecipe, entry_point, load_recipe

stock = load_recipe("lora_dpo_single_device")


class LoRADPORecipeSingleDevice(
    FusedDPORecipe,
    stock.LoRADPORecipeSingleDevice,  # type: ignore[name-defined]
):
    """torchtune's DPO with LoRA on one device, fused."""


recipe_main = entry_point(stock, LoRADPORecipeSingleDevice)

if __name__ == "__main__":
    sys.exit(recipe_main())
