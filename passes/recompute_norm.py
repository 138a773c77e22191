"""A norm that a projection reads -> the same in an activation checkpoint of its own.

Matches      The norms of `rms_norm` and `layer_norm`, in all spellings, that no kernel computes.
Leaves alone norms that an activation checkpoint recomputes, that anything but a matrix product
             reads, or whose readers' weights are frozen; norms whose input has no gradient.
Numerics     The same operations. The backward computes the norm again: it may round otherwise where
             a compiler sums in another order.
"""

from liger_fx.passes._recompute import recompute
from liger_fx.passes.layer_norm import layer_norm
from liger_fx.passes.rms_norm import rms_norm

recompute_norm = recompute("norm", [*rms_norm.patterns, *layer_norm.patterns])
