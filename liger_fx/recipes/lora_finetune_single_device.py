"""torchtune's recipe of the same name, with every config and override that it takes::

    tune run liger_fx/recipes/lora_finetune_single_device \\
        --config llama3_2/1B_lora_single_device compile=True
"""

import sys

from liger_fx.torchtune import FusedRecipe, entry_point, load_recipe

stock = load_recipe("lora_finetune_single_device")


class LoRAFinetuneRecipeSingleDevice(
    FusedRecipe,
    stock.LoRAFinetuneRecipeSingleDevice,  # type: ignore[name-defined]
):
    """torchtune's LoRA, QLoRA and DoRA on one device, fused."""


recipe_main = entry_point(stock, LoRAFinetuneRecipeSingleDevice)

if __name__ == "__main__":
    sys.exit(recipe_main())
