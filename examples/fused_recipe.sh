#!/bin/sh
# liger_fx's form of torchtune's recipe: projection and loss are one op, and each layer is compiled
# with its activation checkpoint inside. Options of liger_fx are config keys: liger_fx.policy=measure.
# From the root of the repository, after `python examples/finetune_docstrings.py --prepare`.
PYTHONPATH="examples:$PYTHONPATH" tune run liger_fx/recipes/full_finetune_single_device \
    --config examples/finetune_docstrings.yaml compile=True "$@"
