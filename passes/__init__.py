"""The rewrites that liger_fx applies, in this order."""

from liger_fx.passes.linear_cross_entropy import linear_cross_entropy

DEFAULT = [
    linear_cross_entropy,  # first: it takes the loss together with the projection that feeds it
]
