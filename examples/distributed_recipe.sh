#!/bin/sh
# FSDP2 over the GPUs of one machine; torchtune 0.6.1 needs GPUs for it. On several machines, run on
# each of them with --nnodes and --rdzv_endpoint, as for torchrun.
# From the root of the repository, after `python examples/finetune_docstrings.py --prepare`.
PYTHONPATH="examples:$PYTHONPATH" tune run --nnodes 1 --nproc_per_node "${GPUS:-2}" \
    liger_fx/recipes/full_finetune_distributed \
    --config examples/finetune_docstrings.yaml compile=True device="${DEVICE:-cuda}" "$@"
