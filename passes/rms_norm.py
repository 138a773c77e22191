"""RMSNorm -> ``liger_fx::rms_norm``.

Matches      ``torch.rms_norm`` between casts (torchtune) and without (nn.RMSNorm, torchtitan); the
             chain of pow, mean, rsqrt and mul of Gemma (``1 + w``), of Hugging Face (cast, then
             ``w *``), of OLMo 2 and GPT-OSS (``w *``, then cast), and without a weight; over the
             last dimension of a tensor of any rank, as for norms of queries and keys.
Leaves alone norms of several dimensions, float64, outputs of another dtype than the input.
Numerics     fp32 statistics; each spelling is rounded where it rounds itself (`_norms.CASTING`).
             DeepSeek-V4's rounds twice, and is rounded once.
"""

from liger_fx.passes import _norms

from liger_fx import ops
from liger_fx.matcher import Match
from liger_fx.rewrite import Rewrite


def check(match: Match, x, eps, weight=None, normalized_shape=None):
    _norms.check_norm(match, x, weight, eps, normalized_shape)


def replace(match: Match, x, weight=None):
    return ops.rms_norm(_norms.as_eager_reads(match, x), weight, *_norms.literals(match))


rms_norm = Rewrite(
    name="rms_norm",
    patterns=[
        _norms.torchtune,
        _norms.torch_module,
        _norms.gemma,
        _norms.huggingface,
        _norms.olmo,
        _norms.olmo_promoted,
        _norms.unweighted,
        _norms.unweighted_rounded,
    ],
    check=check,
    replace=replace,
    saved=["x", "weight"],
)
