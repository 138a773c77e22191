#!/bin/sh
# torchtune's recipe as it is, with liger_fx for the backend of its compile=True. Layers and loss are
# rewritten; the projection runs eagerly between them, which a line in the log says.
# From the root of the repository, after `python examples/finetune_docstrings.py --prepare`.
TORCH_COMPILE_BACKEND=liger_fx PYTHONPATH="examples:$PYTHONPATH" tune run full_finetune_single_device \
    --config examples/finetune_docstrings.yaml compile=True "$@"
