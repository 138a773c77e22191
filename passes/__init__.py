"""The rewrites that liger_fx applies, in this order."""

from liger_fx.passes.add_rms_norm import add_rms_norm
from liger_fx.passes.attention import attention
from liger_fx.passes.cross_entropy import cross_entropy
from liger_fx.passes.embedding import embedding
from liger_fx.passes.geglu import geglu
from liger_fx.passes.layer_norm import layer_norm
from liger_fx.passes.linear_cross_entropy import linear_cross_entropy
from liger_fx.passes.linear_kl import linear_kl
from liger_fx.passes.linear_logprobs import linear_logprobs
from liger_fx.passes.rms_norm import rms_norm
from liger_fx.passes.rope import rope
from liger_fx.passes.softmax_attention import softmax_attention
from liger_fx.passes.swiglu import swiglu
from liger_fx.passes.tiled_mlp import tiled_mlp

DEFAULT = [
    linear_kl,  # first: it takes the cross-entropy of a student together with its divergence
    linear_cross_entropy,  # takes the loss together with the projection that feeds it
    linear_logprobs,  # what preference and RL losses take of the logits
    cross_entropy,  # losses whose logits exist
    softmax_attention,  # before attention, which reads the masks of what it makes
    attention,
    rope,  # before add_rms_norm: a rotation ends in a sum, and a norm of keys may follow
    add_rms_norm,  # before rms_norm: it takes the norm together with the sum that feeds it
    rms_norm,  # norms without a sum in their graph
    layer_norm,
    tiled_mlp,  # before swiglu and geglu: it takes the activation together with its projections
    swiglu,
    geglu,
    embedding,
]
