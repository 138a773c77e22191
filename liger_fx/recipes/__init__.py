"""torchtune's recipes with the head fused: ``tune run liger_fx/recipes/<recipe> --config ...``."""
