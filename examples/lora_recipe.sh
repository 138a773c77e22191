#!/bin/sh
# LoRA on a frozen model, whose head needs no weight gradient. quantize_base=True would make it QLoRA
# (the widths of real models; the demo's are too small), use_dora=True DoRA.
# From the root of the repository, after `python examples/finetune_docstrings.py --prepare`.
PYTHONPATH="examples:$PYTHONPATH" tune run liger_fx/recipes/lora_finetune_single_device \
    --config examples/finetune_docstrings.yaml compile=True \
    model._component_=torchtune.models.llama3_2.lora_llama3_2 \
    "model.lora_attn_modules=[q_proj,v_proj,output_proj]" model.apply_lora_to_mlp=True \
    model.lora_rank=8 model.lora_alpha=16 save_adapter_weights_only=True \
    lr_scheduler._component_=torchtune.training.get_cosine_schedule_with_warmup \
    lr_scheduler.num_warmup_steps=5 "$@"
