"""``tune run liger_fx/recipes/full_finetune_single_device --config llama3_2/1B_full_single_device``

torchtune's recipe of the same name, with every config and override that it takes. With
``compile=True`` the head and the loss are one compiled region and each layer is compiled with its
activation checkpoint inside.
"""

import sys

from omegaconf import DictConfig
from torchtune import config

from liger_fx.torchtune import FusedRecipe, load_recipe

stock = load_recipe("full_finetune_single_device")


class FullFinetuneRecipeSingleDevice(
    FusedRecipe,
    stock.FullFinetuneRecipeSingleDevice,  # type: ignore[name-defined]
):
    """torchtune's full fine-tuning on one device, fused."""


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Entry point: settings from the config file, overridden by the command line."""
    config.log_config(recipe_name="liger_fx FullFinetuneRecipeSingleDevice", cfg=cfg)
    recipe = FullFinetuneRecipeSingleDevice(cfg=cfg)
    recipe.setup(cfg=cfg)
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
