"""What our launchers take from Liger's modules, which are no public interface.

A launch passes most arguments by position: a kernel with other parameters would raise in the middle
of a step, or take one for another. So names and order are compared before a module is first used.
"""

from __future__ import annotations

import inspect
from importlib.metadata import version
from itertools import zip_longest
from types import ModuleType

# By function: the parameters that a launcher passes, in their order. None: not a function.
TAKEN: dict[str, dict[str, str | None]] = {
    "utils": {"calculate_settings": "n"},
    "rms_norm": {
        "torch_to_triton_dtype": None,
        "_rms_norm_forward_kernel": (
            "Y_ptr Y_row_stride X_ptr X_row_stride W_ptr W_row_stride RSTD_ptr RSTD_row_stride "
            "n_cols eps offset casting_mode elementwise_affine BLOCK_SIZE"
        ),
        "_rms_norm_backward_kernel": (
            "dY_ptr dY_row_stride dX_ptr dX_row_stride X_ptr X_row_stride X_dtype W_ptr "
            "W_row_stride RSTD_ptr RSTD_row_stride dW_ptr dW_row_stride n_rows n_cols offset "
            "rows_per_program casting_mode elementwise_affine BLOCK_SIZE COMPUTE_DW"
        ),
        "_block_rms_norm_forward_kernel": (
            "Y_ptr Y_row_stride X_ptr X_row_stride W_ptr W_row_stride RSTD_ptr RSTD_row_stride "
            "n_rows n_cols eps offset casting_mode elementwise_affine BLOCK_SIZE BLOCK_ROW"
        ),
        "_block_rms_norm_backward_kernel": (
            "dY_ptr dY_row_stride dX_ptr dX_row_stride X_ptr X_row_stride X_dtype W_ptr "
            "W_row_stride RSTD_ptr RSTD_row_stride dW_ptr dW_row_stride n_rows n_cols offset "
            "casting_mode elementwise_affine BLOCK_SIZE BLOCK_ROW COMPUTE_DW"
        ),
    },
    "fused_add_rms_norm": {
        "torch_to_triton_dtype": None,
        "_fused_add_rms_norm_forward_kernel": (
            "Y_ptr Y_row_stride S_ptr S_row_stride X_ptr X_row_stride R_ptr R_row_stride W_ptr "
            "W_row_stride RSTD_ptr RSTD_row_stride n_cols eps offset casting_mode BLOCK_SIZE"
        ),
        "_fused_add_rms_norm_backward_kernel": (
            "dY_ptr dY_row_stride dS_out_ptr dS_out_row_stride dX_ptr dX_row_stride X_ptr "
            "X_row_stride X_dtype W_ptr W_row_stride RSTD_ptr RSTD_row_stride dW_ptr "
            "dW_row_stride n_rows n_cols offset rows_per_program casting_mode BLOCK_SIZE "
            "has_dS_out COMPUTE_DW"
        ),
    },
    "layer_norm": {
        "_layer_norm_forward_kernel": (
            "Y_ptr Y_row_stride X_ptr X_row_stride W_ptr W_row_stride B_ptr B_row_stride "
            "Mean_ptr Mean_row_stride RSTD_ptr RSTD_row_stride n_cols eps BLOCK_SIZE"
        ),
        "_layer_norm_backward_kernel": (
            "X_ptr stride_x W_ptr Mean_ptr stride_mean RSTD_ptr stride_rstd DX_ptr stride_dx "
            "DW_ptr stride_dw DB_ptr stride_db DY_ptr stride_dy n_rows n_cols rows_per_program "
            "BLOCK_SIZE COMPUTE_DW COMPUTE_DB"
        ),
    },
    "swiglu": {
        "_swiglu_forward_kernel": "a_ptr b_ptr c_ptr stride gate_multiplier n_cols BLOCK_SIZE",
        "_swiglu_backward_kernel": "dc_ptr a_ptr b_ptr stride gate_multiplier n_cols BLOCK_SIZE",
        "_swiglu_fused_gate_up_forward_kernel": (
            "y_ptr c_ptr in_stride out_stride ffn_size BLOCK_SIZE"
        ),
        "_swiglu_fused_gate_up_backward_kernel": (
            "dc_ptr y_ptr dy_ptr in_stride out_stride ffn_size BLOCK_SIZE"
        ),
    },
    "geglu": {
        "_geglu_tanh_forward_kernel": "a b c stride n_cols BLOCK_SIZE",
        "_geglu_tanh_backward_kernel": "dc a b stride n_cols BLOCK_SIZE",
    },
    "cross_entropy": {
        "MAX_FUSED_SIZE": None,
        "is_hip": "",
        "liger_cross_entropy_kernel": (
            "X_ptr X_stride Y_ptr Y_stride weight_ptr loss_ptr z_loss_ptr loss_stride "
            "token_accuracy_ptr token_accuracy_stride predicted_tokens_ptr "
            "predicted_tokens_stride n_cols n_non_ignore sum_non_ignore_weight weight_sum "
            "ignore_index lse_square_scale label_smoothing reduction softcap RETURN_Z_LOSS "
            "RETURN_TOKEN_ACCURACY RETURN_PREDICTED_TOKENS BLOCK_SIZE HAS_WEIGHT "
            "HAS_SOFTCAPPING HAS_GRADIENTS"
        ),
    },
}


class Misfit(RuntimeError):
    """A module of Liger's is not as our launchers expect it."""


def check_signatures(module: ModuleType) -> None:
    """Raise `Misfit` if ``module`` lacks something that is taken from it, or has it with other
    parameters. A further parameter with a default is no misfit."""
    for name, parameters in TAKEN.get(module.__name__.rsplit(".", 1)[-1], {}).items():
        if not hasattr(module, name):
            raise Misfit(f"{_liger()} has no `{module.__name__}.{name}`")
        if parameters is None:
            continue
        expected = parameters.split()
        for i, pair in enumerate(zip_longest(_needed(module, name, expected), expected), 1):
            found, wanted = (f"`{p}`" if p else "none" for p in pair)
            if found != wanted:
                raise Misfit(
                    f"parameter {i} of `{name}` in {_liger()} is {found}, liger_fx passes {wanted}"
                )


def _needed(module: ModuleType, name: str, expected: list[str]) -> list[str]:
    """The parameters of a function or Triton kernel that have no default or are ``expected``."""
    function = getattr(module, name)
    parameters = inspect.signature(getattr(function, "fn", function)).parameters.values()
    return [p.name for p in parameters if p.default is p.empty or p.name in expected]


def _liger() -> str:
    return f"liger_kernel {version('liger_kernel')}"
