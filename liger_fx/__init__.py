"""A torch.compile backend that replaces subgraphs of a decoder by Liger's kernels."""

from liger_fx.deferred import DeferredLogits
from liger_fx.dynamo import (
    RequirementError,
    backend,
    clear_reports,
    explain,
    liger_fx,
    reports,
)
from liger_fx.matcher import Match
from liger_fx.options import OptionError
from liger_fx.pattern import chain, guard
from liger_fx.report import NearMiss, Rejection, Replacement, Report
from liger_fx.rewrite import Reject, Rewrite, rewrite_graph

__version__ = "0.1.0"

__all__ = [
    "DeferredLogits",
    "Match",
    "NearMiss",
    "OptionError",
    "Reject",
    "Rejection",
    "Replacement",
    "Report",
    "RequirementError",
    "Rewrite",
    "__version__",
    "backend",
    "chain",
    "clear_reports",
    "explain",
    "guard",
    "liger_fx",
    "reports",
    "rewrite_graph",
]
