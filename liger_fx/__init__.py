"""A torch.compile backend that replaces subgraphs of a decoder by Liger's kernels."""

from liger_fx.backend import RequirementError, explain, liger_fx, reports
from liger_fx.report import NearMiss, Rejection, Replacement, Report
from liger_fx.rewrite import Reject, Rewrite, rewrite_graph

__all__ = [
    "NearMiss",
    "Reject",
    "Rejection",
    "Replacement",
    "Report",
    "RequirementError",
    "Rewrite",
    "explain",
    "liger_fx",
    "reports",
    "rewrite_graph",
]
