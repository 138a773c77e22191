"""torchtune's recipe of the same name, with every config and override that it takes::

    tune run liger_fx/recipes/ppo_full_finetune_single_device \\
        --config mistral/7B_full_ppo_low_memory compile=True
"""

import sys

from liger_fx.torchtune import FusedPPORecipe, entry_point, load_recipe

stock = load_recipe("ppo_full_finetune_single_device")


class PPOFullFinetuneRecipeSingleDevice(
    FusedPPORecipe,
    stock.PPOFullFinetuneRecipeSingleDevice,  # type: ignore[name-defined]
):
    """torchtune's PPO on one device, the log-probabilities that it trains on taken without
    logits."""


recipe_main = entry_point(stock, PPOFullFinetuneRecipeSingleDevice)

if __name__ == "__main__":
    sys.exit(recipe_main())
