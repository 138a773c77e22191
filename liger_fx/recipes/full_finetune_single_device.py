"""torchtune's recipe of the same name, with every config and override that it takes::

    tune run liger_fx/recipes/full_finetune_single_device \\
        --config llama3_2/1B_full_single_device compile=True
"""

import sys

from liger_fx.torchtune import FusedRecipe, entry_point, load_recipe

stock = load_recipe("full_finetune_single_device")


class FullFinetuneRecipeSingleDevice(
    FusedRecipe,
    stock.FullFinetuneRecipeSingleDevice,  # type: ignore[name-defined]
):
    """torchtune's full fine-tuning on one device, fused."""


recipe_main = entry_point(stock, FullFinetuneRecipeSingleDevice)

if __name__ == "__main__":
    sys.exit(recipe_main())
