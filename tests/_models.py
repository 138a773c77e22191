"""Tiny models of every family, the ways in which people compile them, and how often each rewrite
fires there: `FAMILIES`, `IN_PLACE` and `MODES`. ``python tests/_models.py`` prints them as the
documentation shows them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any
from unittest import mock

import torch
from _util import DEVICE
from torch import Tensor, nn
from torchtune import rlhf, training
from torchtune.models import (
    gemma,
    gemma2,
    llama2,
    llama3,
    llama3_1,
    llama3_2,
    mistral,
    phi3,
    phi4,
    qwen2,
    qwen2_5,
    t5,
)
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.loss import CEWithChunkedOutputLoss, ForwardKLLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params


@contextlib.contextmanager
def torchvision_stub() -> Iterator[None]:
    """torchtune's CLIP and vision models import torchvision for their image transforms, which none
    of these tests uses. Where it is not installed, something of its name stands in meanwhile."""
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        sys.modules.update({name: mock.MagicMock() for name in names})
        yield
        for name in names:
            del sys.modules[name]
    else:
        yield


with torchvision_stub():
    from torchtune.models import clip, llama3_2_vision


# -- what is expected ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Law:
    """How often a rewrite fires in a model of n layers: ``per_layer * n + once``."""

    per_layer: int = 0
    once: int = 0

    def __call__(self, layers: int) -> int:
        return self.per_layer * layers + self.once

    def __rmul__(self, factor: int) -> Law:
        return Law(factor * self.per_layer, factor * self.once)

    def __add__(self, once: int) -> Law:
        return Law(self.per_layer, self.once + once)

    def __str__(self) -> str:
        factor = "" if self.per_layer == 1 else self.per_layer
        terms = [f"{factor}n"] * bool(self.per_layer) + [str(self.once)] * bool(self.once)
        return " + ".join(terms)


@dataclass(frozen=True)
class Refused:
    """Something like it is there, and the report says why it is left alone."""

    reason: str


Cell = Law | Refused | str  # a string: why there is nothing to replace
Cells = dict[str, Cell]

n, once = Law(per_layer=1), Law(once=1)

NONE = "the model has none"
WITH_HEAD = "`linear_cross_entropy` takes the loss together with its projection"
WITH_PROJECTIONS = "`tiled_mlp` takes the activation together with its projections"
SOFTCAP = "scores are capped: no `scaled_dot_product_attention`"
NO_GATE = "QuickGELU has no gate"
RELU_SQUARED = "ReLU² has no gate"
SINKS = "attention sinks: no `scaled_dot_product_attention`"
IN_32_BITS = Refused("the table is torch.float32")  # in 16 bits each is replaced
FROZEN = Refused("the table gets no gradient")
AS_MANY = "there are as many key heads as query heads"
ENCODER = "an encoder has no loss of its own"
ELSEWHERE = Refused(
    "an input of this graph: what computes it was traced elsewhere, or runs eagerly"
)

LLAMA: Cells = dict(
    linear_kl=NONE,
    linear_cross_entropy=once,
    linear_logprobs=NONE,
    cross_entropy=WITH_HEAD,
    softmax_attention=NONE,
    attention=n,
    rope=2 * n,
    add_rms_norm=2 * n,
    rms_norm=once,  # the first: nothing is added to the embedding
    layer_norm=NONE,
    tiled_mlp=n,
    swiglu=WITH_PROJECTIONS,
    geglu=NONE,
    embedding=IN_32_BITS,
)
ADAPTERS: Cells = LLAMA | dict(embedding=FROZEN)
LAYER_NORMS: Cells = LLAMA | dict(add_rms_norm=NONE, rms_norm=NONE, layer_norm=2 * n + 1)
EXPERTS: Cells = LLAMA | dict(tiled_mlp="experts are grouped matrix products", swiglu=n)
GEMMA: Cells = LLAMA | dict(swiglu=NONE, geglu=WITH_PROJECTIONS)
POST_NORMS: Cells = GEMMA | dict(rms_norm=2 * n + 1)  # of what attention and MLP give
GEMMA2: Cells = POST_NORMS | dict(attention=SOFTCAP)
VISION: Cells = LLAMA | dict(  # a layer of self-attention and one of cross-attention, n times
    linear_cross_entropy=ELSEWHERE,  # torchtune's fusion embedding breaks the graph
    cross_entropy=once,
    attention=2 * n,
    add_rms_norm=4 * n,
    rms_norm=2 * n + 1,
    tiled_mlp=2 * n,
)
T5: Cells = LLAMA | dict(
    linear_cross_entropy=ENCODER,
    cross_entropy=ENCODER,
    softmax_attention=Refused("wanted add, found `add_`"),
    attention="a trained bias is added to the scores: no `scaled_dot_product_attention`",
    tiled_mlp=n,
    swiglu=NONE,
    geglu=WITH_PROJECTIONS,
    rope="positions are a bias on the attention scores",
)
CLIP: Cells = T5 | dict(
    softmax_attention=NONE,
    attention=AS_MANY,
    add_rms_norm=NONE,
    rms_norm=NONE,
    layer_norm=2 * n + 1,
    tiled_mlp=NO_GATE,
    geglu=NO_GATE,
    rope="positions are trained embeddings",
)


# -- families --------------------------------------------------------------------------------------

HALF = 5e-2  # more than the relative error of any gradient of a step in bf16
VOCAB, BATCH, LENGTH, WIDTH = 67, 2, 16, 32
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, num_heads=4, num_kv_heads=2, embed_dim=WIDTH, intermediate_dim=48,
    max_seq_len=32,
)  # fmt: skip
HEAD_DIM = dict(head_dim=8)
ENCODER_LENGTH = 12

Build = Callable[[int], nn.Module]
Loss = Callable[..., Tensor]  # (net, tokens, labels, **inputs of the net)


def sized(component: Callable[..., nn.Module], **sizes: Any) -> Build:
    return lambda layers: component(num_layers=layers, **SIZES | sizes)


def released(model: Callable[..., nn.Module], component: Callable[..., nn.Module]) -> Build:
    """A released model as its own builder makes it, except for the sizes."""
    home = sys.modules[model.__module__]

    def build(layers: int) -> nn.Module:
        def smaller(**sizes: Any) -> nn.Module:
            return component(**sizes | SIZES | {"num_layers": layers})

        with mock.patch.object(home, component.__name__, smaller):
            return model()

    return build


def t5_encoder(layers: int) -> nn.Module:
    return t5.t5_encoder(
        embed_dim=WIDTH, mlp_dim=48, num_heads=4, head_dim=8, num_layers=layers,
        rel_pos_num_buckets=8, rel_pos_max_dist=16, vocab_size=VOCAB, norm_eps=1e-6,
        max_seq_len=LENGTH,
    )  # fmt: skip


def clip_text_encoder(layers: int) -> nn.Module:
    return clip.clip_text_encoder(
        embed_dim=WIDTH, num_heads=4, num_layers=layers, vocab_size=VOCAB, max_seq_len=LENGTH
    )


def huggingface(name: str, **sizes: Any) -> Build:
    def build(layers: int) -> nn.Module:
        import transformers

        small: dict[str, Any] = dict(
            vocab_size=VOCAB, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, hidden_size=WIDTH, intermediate_size=48,
            max_position_embeddings=32, use_cache=False, bos_token_id=1, eos_token_id=2,
            pad_token_id=0,
        )  # fmt: skip
        config = getattr(transformers, f"{name}Config")(**small | sizes)
        return transformers.AutoModelForCausalLM.from_config(config)

    return build


def lora(**settings: Any) -> Build:
    """Llama 3 with adapters everywhere; only they are trained, as in torchtune's recipes."""
    build = sized(
        llama3.lora_llama3, lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"],
        apply_lora_to_mlp=True, lora_rank=4, lora_alpha=8, **settings,
    )  # fmt: skip

    def frozen(layers: int) -> nn.Module:
        net = build(layers)
        set_trainable_params(net, get_adapter_params(net))
        return net

    return frozen


def lora_by_peft(layers: int) -> nn.Module:
    import peft

    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    # PEFT refuses the torchao that torchtune takes, and does without any.
    with mock.patch("peft.tuners.lora.torchao.is_torchao_available", return_value=False):
        return peft.get_peft_model(huggingface("Llama")(layers), settings)


def fake_quantised(layers: int) -> nn.Module:
    """The model on which torchtune's QAT recipes train."""
    from torchtune.training.quantization import Int8DynActInt4WeightQATQuantizer

    return Int8DynActInt4WeightQATQuantizer(groupsize=16).prepare(sized(llama3.llama3)(layers))


_cross_entropy = nn.CrossEntropyLoss()
_divergence = ForwardKLLoss()


def recipe_loss(net: nn.Module, tokens: Tensor, labels: Tensor, **inputs: Any) -> Tensor:
    """The step of torchtune's recipes."""
    logits = net(tokens, **inputs)
    labels = shifted(labels).reshape(-1)
    return _cross_entropy(logits.reshape(-1, logits.size(-1)), labels)


def dpo_loss(net: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """What torchtune's DPO recipes take of the logits."""
    return -rlhf.get_batch_log_probs(net(tokens), labels).mean()


def distillation_loss(net: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """The loss of torchtune's recipes for distillation; the teacher is no more than a head."""
    logits, labels = net(tokens).reshape(-1, VOCAB), shifted(labels).reshape(-1)
    with torch.no_grad():
        hidden = torch.linspace(0, 9, len(labels) * 24, device=tokens.device).sin().view(-1, 24)
        weight = torch.linspace(0, 99, VOCAB * 24, device=tokens.device).cos().view(-1, 24)
        teacher = nn.functional.linear(hidden, weight)
    divergence = _divergence(logits, teacher, labels, normalize=False) / (labels != -100).sum()
    return 0.5 * _cross_entropy(logits, labels) + 0.5 * divergence


def shifted(labels: Tensor) -> Tensor:
    return torch.hstack((labels[..., 1:], torch.full_like(labels[:, :1], -100)))


def vision_loss(net: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    count = BATCH * ENCODER_LENGTH * WIDTH
    image = torch.linspace(-1, 1, count, device=tokens.device).view(BATCH, ENCODER_LENGTH, WIDTH)
    seen = torch.ones(BATCH, LENGTH, ENCODER_LENGTH, dtype=torch.bool, device=tokens.device)
    image = image.to(next(net.parameters()).dtype)
    return recipe_loss(net, tokens, labels, encoder_input=image, encoder_mask=seen)


def encoder_loss(net: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    return net(tokens).float().sin().mean()


def own_loss(net: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    return net(input_ids=tokens, labels=labels).loss


# -- modes -----------------------------------------------------------------------------------------

# (tokens, labels) -> the loss, or a model's output that has ``loss`` and ``logits``
Step = Callable[[Tensor, Tensor], Any]
Mode = Callable[[nn.Module, Loss, str], Step]  # (net, loss, backend) -> step


def whole_step(net: nn.Module, loss: Loss, backend: str) -> Step:
    return torch.compile(partial(loss, net), backend=backend, fullgraph=True)


def step_with_breaks(net: nn.Module, loss: Loss, backend: str) -> Step:
    return torch.compile(partial(loss, net), backend=backend)


def model_in_place(net: nn.Module, loss: Loss, backend: str) -> Step:
    """``model.compile(backend="liger_fx")``: the model returns its logits beside its loss."""
    net.compile(backend=backend)
    return lambda tokens, labels: net(input_ids=tokens, labels=labels)


def per_layer(net: nn.Module, loss: Loss, backend: str) -> Step:
    """``compile=True`` of torchtune's recipes: a graph that all layers share, the rest eager."""
    with mock.patch.dict(os.environ, TORCH_COMPILE_BACKEND=backend):
        training.compile_model(net, verbose=False)
    return partial(loss, net)


def chunked_loss(net: nn.Module, loss: Loss, backend: str) -> Step:
    """A recipe's layers and its chunked loss, each compiled on its own."""
    with mock.patch.dict(os.environ, TORCH_COMPILE_BACKEND=backend):
        training.compile_model(net, verbose=False)
        chunked = training.compile_loss(CEWithChunkedOutputLoss(), verbose=False)
    net.set_num_output_chunks(chunked.num_output_chunks)
    return lambda tokens, labels: chunked(net(tokens), shifted(labels))


def checkpoint_outside(net: nn.Module, loss: Loss, backend: str) -> Step:
    """A recipe with both: it compiles the layers, and checkpoints around them."""
    step = chunked_loss(net, loss, backend)
    checkpoint(net)
    return step


def checkpoint_inside(net: nn.Module, loss: Loss, backend: str) -> Step:
    """The whole step: each layer is a body of its own, in which the rewrites happen."""
    checkpoint(net)
    return whole_step(net, loss, backend)


def checkpoint(net: nn.Module) -> None:
    if hasattr(net, "gradient_checkpointing_enable"):
        net.gradient_checkpointing_enable()
    else:
        policy = {TransformerSelfAttentionLayer}
        training.set_activation_checkpointing(net, auto_wrap_policy=policy)


def packed(net: nn.Module, loss: Loss, backend: str) -> Step:
    """Two documents in a row, as PackedDataset batches them where there is no flex attention."""
    return whole_step(net, partial(loss, **_two_documents()), backend)


def packed_per_layer_with_flex(net: nn.Module, loss: Loss, backend: str) -> Step:
    """Where there is, each layer is in pieces: torchtune keeps the compiler out of flex attention.
    It needs a GPU; another attention that the compiler is kept out of leaves the same pieces."""
    for layer in net.layers:
        layer.attn._attention_call = _attention_in_eager
    return per_layer(net, partial(loss, **_two_documents()), backend)


@torch.compiler.disable(recursive=False)
def _attention_in_eager(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout_p: float, is_causal: bool
) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None])


def _two_documents() -> dict[str, Tensor]:
    first = LENGTH // 3
    with torch.device(DEVICE):
        positions = torch.cat([torch.arange(first), torch.arange(LENGTH - first)])
        second = torch.arange(LENGTH) >= first
        mask = (second[:, None] == second) & torch.ones(LENGTH, LENGTH).tril().bool()
    inputs = dict(mask=mask.repeat(BATCH, 1, 1), input_pos=positions.repeat(BATCH, 1))
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def autocast_outside(net: nn.Module, loss: Loss, backend: str) -> Step:
    return _autocast(whole_step(net, loss, backend))


def autocast_inside(net: nn.Module, loss: Loss, backend: str) -> Step:
    return torch.compile(_autocast(partial(loss, net)), backend=backend, fullgraph=True)


def _autocast(step: Step) -> Step:
    def cast(tokens: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return step(tokens, labels)

    return cast


def dynamic(net: nn.Module, loss: Loss, backend: str) -> Step:
    return torch.compile(partial(loss, net), backend=backend, fullgraph=True, dynamic=True)


def second_length(net: nn.Module, loss: Loss, backend: str) -> Step:
    """A graph for the first length, and one for all others."""
    step = whole_step(net, loss, backend)

    def lengths(tokens: Tensor, labels: Tensor) -> Tensor:
        short = [step(tokens[:, :s], labels[:, :s]) for s in (LENGTH // 2, LENGTH - 4)]
        return sum(short, step(tokens, labels))

    return lengths


def evaluation(net: nn.Module, loss: Loss, backend: str) -> Step:
    return torch.no_grad()(whole_step(net, loss, backend))


def prefill(net: nn.Module, loss: Loss, backend: str) -> Step:
    """The prompt of a generation, into the key-value cache."""
    with torch.device(DEVICE):
        net.setup_caches(batch_size=BATCH, dtype=torch.float32)
        mask = torch.ones(LENGTH, SIZES["max_seq_len"]).tril().bool().repeat(BATCH, 1, 1)
        positions = torch.arange(LENGTH).repeat(BATCH, 1)
    logits = torch.compile(partial(net, mask=mask, input_pos=positions), backend=backend)

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        net.reset_caches()
        return logits(tokens)

    return torch.no_grad()(step)


# -- the table -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A family compiled in a mode. ``graphs``: how many of them Dynamo makes. ``deferred``: how many
    logits the model compiled in place returns deferred."""

    library: str
    family: str
    build: Build
    cells: Cells
    loss: Loss = recipe_loss
    mode: Mode = whole_step
    graphs: int = 1
    tolerance: float = 1e-5  # relative, of value, logits and gradients
    inner: str = "eager"
    deferred: Cell = NONE

    def __str__(self) -> str:
        return f"{self.library}-{self.family}-{self.mode.__name__}"


def twice(cells: Cells) -> Cells:
    return {name: 2 * cell if isinstance(cell, Law) else cell for name, cell in cells.items()}


tune = partial(Row, "torchtune")
face = partial(Row, "transformers", loss=own_loss, deferred=once)

FAMILIES = [
    tune("llama2", sized(llama2.llama2), LLAMA),
    tune("llama3", sized(llama3.llama3), LLAMA),
    tune("llama3_1", sized(llama3_1.llama3_1), LLAMA),
    tune("llama3_2", sized(llama3_2.llama3_2), LLAMA),
    tune("mistral", sized(mistral.mistral), LLAMA),
    tune("phi3", sized(phi3.phi3), LLAMA),
    tune("phi4", released(phi4.phi4_14b, phi3.phi3), LLAMA),
    tune("qwen2", sized(qwen2.qwen2), LLAMA),
    tune("qwen2_5", released(qwen2_5.qwen2_5_7b_base, qwen2.qwen2), LLAMA),
    tune("qwen2_5 (tied)", released(qwen2_5.qwen2_5_0_5b, qwen2.qwen2), LLAMA),
    tune("gemma", sized(gemma.gemma, **HEAD_DIM), GEMMA),
    tune("gemma2", sized(gemma2.gemma2, sliding_window_size=8, **HEAD_DIM), GEMMA2),
    tune(
        "llama3_2_vision (decoder)",
        sized(
            llama3_2_vision.llama3_2_vision_decoder, fusion_interval=1, num_special_tokens=2,
            encoder_max_seq_len=ENCODER_LENGTH,
        ),
        VISION,
        vision_loss,
        step_with_breaks,
        graphs=6,
    ),
    tune("t5 (encoder)", t5_encoder, T5, encoder_loss),
    tune("clip (text)", clip_text_encoder, CLIP, encoder_loss),
    face("Llama", huggingface("Llama"), LLAMA),
    face("Mistral", huggingface("Mistral"), LLAMA),
    face("Qwen2", huggingface("Qwen2"), LLAMA),
    face("Phi3", huggingface("Phi3"), LLAMA),
    face("Qwen3", huggingface("Qwen3", **HEAD_DIM), LLAMA | dict(rms_norm=2 * n + 1)),
    face("Gemma2", huggingface("Gemma2", **HEAD_DIM), GEMMA2),
    face(
        "Gemma3 (text)",
        huggingface("Gemma3Text", sliding_window_pattern=2, **HEAD_DIM),
        POST_NORMS | dict(rms_norm=4 * n + 1),
    ),
    face("GLM", huggingface("Glm", **HEAD_DIM), LLAMA),
    face("Helium", huggingface("Helium", **HEAD_DIM), LLAMA),
    face("ERNIE 4.5", huggingface("Ernie4_5", **HEAD_DIM), LLAMA),
    face("OLMo 2", huggingface("Olmo2"), LLAMA | dict(add_rms_norm=once, rms_norm=4 * n)),
    face("OLMo", huggingface("Olmo"), LAYER_NORMS),
    face(
        "Cohere",
        huggingface("Cohere"),
        LAYER_NORMS | dict(layer_norm=n + 1),
    ),
    face(
        "ModernBERT (decoder)",
        huggingface("ModernBertDecoder"),
        LAYER_NORMS
        | dict(
            layer_norm=2 * n + 2,
            tiled_mlp="dropout between the product and its projection",
            swiglu=NONE,
            geglu=n,
        ),
    ),
    face(
        "nanochat",
        huggingface("NanoChat"),
        LLAMA
        | dict(
            add_rms_norm=2 * n,
            rms_norm=2 * n + 2,
            tiled_mlp=RELU_SQUARED,
            swiglu=RELU_SQUARED,
        ),
    ),
    face(
        "DeepSeek-V3",
        huggingface(
            "DeepseekV3", num_key_value_heads=4, moe_intermediate_size=24, n_routed_experts=4,
            n_group=1, topk_group=1, num_experts_per_tok=2, kv_lora_rank=16, q_lora_rank=16,
            qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=0,
        ),
        EXPERTS | dict(rms_norm=2 * n + 1, tiled_mlp=n),
    ),
    face(
        "GPT-OSS",
        huggingface("GptOss", **HEAD_DIM, num_local_experts=4, num_experts_per_tok=2),
        EXPERTS | dict(attention=SINKS),
    ),
    face(
        "Qwen3-MoE",
        huggingface(
            "Qwen3Moe", **HEAD_DIM, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
        ),
        EXPERTS | dict(rms_norm=2 * n + 1),
    ),
    face(
        "Llama 4 (text)",
        huggingface(
            "Llama4Text", **HEAD_DIM, num_local_experts=4, intermediate_size_mlp=48,
            use_qk_norm=True,
        ),
        EXPERTS | dict(rms_norm=2 * n + 1, tiled_mlp=n),
    ),
]  # fmt: skip

# Two under Inductor, which takes seconds: a plain head, and one that caps its logits.
IN_PLACE = [
    replace(
        row,
        mode=model_in_place,
        inner="inductor" if row.family in ("Llama", "Gemma2") else "aot_eager",
    )
    for row in FAMILIES
    if row.deferred != NONE
]

EAGER_HEAD = "torchtune runs projection and loss eagerly"
NO_LOSS = "a prompt has no loss"
PER_LAYER: Cells = LLAMA | dict(  # of any depth: one graph
    linear_cross_entropy=EAGER_HEAD,
    cross_entropy=EAGER_HEAD,
    attention=once,
    add_rms_norm=once,
    rms_norm=once,
    tiled_mlp=once,
    rope=2 * once,
    embedding="torchtune looks tokens up eagerly",
)
CHUNKED: Cells = PER_LAYER | dict(linear_cross_entropy=ELSEWHERE, cross_entropy=once)
PREFILL: Cells = dict(linear_cross_entropy=NO_LOSS, cross_entropy=NO_LOSS, embedding=FROZEN)
CHECKPOINTED: Cells = dict(add_rms_norm=n, rms_norm=n + 1)  # sums of two layers stay outside
FLEX: Cells = PER_LAYER | dict(attention="torchtune keeps the compiler out of flex attention")
EVALUATION: Cells = dict(
    linear_cross_entropy=Refused("no gradient is needed and the logits fit one chunk"),
    cross_entropy=once,
    embedding=FROZEN,
)

llama = partial(tune, "llama3", sized(llama3.llama3))
gemma_2 = partial(tune, "gemma2", sized(gemma2.gemma2, sliding_window_size=8, **HEAD_DIM))
phi_3 = partial(tune, "phi3", sized(phi3.phi3))
hf_llama = partial(face, "Llama", huggingface("Llama"))

MODES = [
    llama(PER_LAYER, mode=per_layer),
    llama(CHUNKED, mode=chunked_loss, graphs=2),
    llama(CHUNKED, mode=checkpoint_outside, graphs=2),
    llama(LLAMA | CHECKPOINTED, mode=checkpoint_inside),
    llama(LLAMA, mode=packed),
    llama(FLEX, mode=packed_per_layer_with_flex, graphs=4),
    llama(LLAMA, mode=autocast_outside, tolerance=HALF),
    llama(LLAMA, mode=autocast_inside, tolerance=HALF),
    llama(LLAMA, mode=dynamic),
    llama(twice(LLAMA), mode=second_length, graphs=2),
    llama(LLAMA | EVALUATION, mode=evaluation),
    llama(LLAMA | PREFILL, mode=prefill),
    # Sliding and full attention are two graphs.
    gemma_2(
        PER_LAYER
        | dict(
            attention=SOFTCAP,
            add_rms_norm=2 * once,
            rms_norm=6 * once,
            tiled_mlp=2 * once,
            swiglu=NONE,
            geglu=WITH_PROJECTIONS,
            rope=4 * once,
        ),
        mode=per_layer,
        graphs=2,
    ),
    gemma_2(
        GEMMA2
        | CHECKPOINTED
        | dict(
            rms_norm=3 * n + 1,
            tiled_mlp=Refused("the backward needs the MLP's output"),  # for the norm after it
            geglu=n,
        ),
        mode=checkpoint_inside,
    ),
    gemma_2(GEMMA2, mode=packed),
    gemma_2(GEMMA2, mode=autocast_outside, tolerance=HALF),
    gemma_2(GEMMA2, mode=dynamic),
    gemma_2(GEMMA2 | PREFILL, mode=prefill),
    phi_3(LLAMA, mode=packed),
    phi_3(LLAMA, mode=autocast_outside, tolerance=HALF),
    phi_3(twice(LLAMA), mode=second_length, graphs=2),
    hf_llama(LLAMA | CHECKPOINTED, mode=checkpoint_inside),
    face(
        "Llama (eager attention)",
        huggingface("Llama", attn_implementation="eager"),
        LLAMA | dict(softmax_attention=n),
    ),
    # In bf16 its attention is computed in fp32, and left alone.
    face(
        "GPT-J",
        huggingface("GPTJ", rotary_dim=4, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
        LAYER_NORMS
        | dict(softmax_attention=n, layer_norm=n + 1, tiled_mlp="GELU has no gate", swiglu=NONE),
    ),
    hf_llama(LLAMA, mode=autocast_outside, tolerance=HALF),
    hf_llama(twice(LLAMA), mode=second_length, graphs=2),
    tune(
        "llama3 (DPO)",
        sized(llama3.llama3),
        LLAMA | dict(linear_cross_entropy=NONE, linear_logprobs=once, cross_entropy=NONE),
        loss=dpo_loss,
    ),
    tune(
        "llama3 (distillation)",
        sized(llama3.llama3),
        LLAMA | dict(linear_kl=once, linear_cross_entropy=NONE, cross_entropy=NONE),
        loss=distillation_loss,
    ),
    tune("LoRA", lora(), ADAPTERS),
    # The input of the first layer needs no gradient: two graphs.
    tune("LoRA", lora(), twice(PER_LAYER), mode=per_layer, graphs=2),
    Row("peft", "LoRA by PEFT", lora_by_peft, ADAPTERS, own_loss),
    tune(
        "LoRA on the head",
        lora(apply_lora_to_output=True),
        ADAPTERS
        | dict(
            linear_cross_entropy=Refused("the logits are a sum (LoRA on the head?)"),
            cross_entropy=once,
        ),
    ),
    tune(
        "DoRA",
        lora(use_dora=True),
        ADAPTERS | dict(tiled_mlp=Refused("DoRA scales each row of the sum"), swiglu=n),
    ),
    tune(
        "QLoRA",
        lora(quantize_base=True, embed_dim=128, intermediate_dim=256, num_kv_heads=4),
        ADAPTERS
        | dict(
            attention=AS_MANY,
            tiled_mlp=Refused("what an adapter is added to is no plain projection"),
            swiglu=n,
        ),
    ),
    tune("QAT", fake_quantised, LLAMA | dict(tiled_mlp="what is projected is quantised", swiglu=n)),
]


# -- as Markdown -----------------------------------------------------------------------------------


def markdown(
    rows: list[Row],
    name: Callable[[Row], str],
    cells: Callable[[Row], Cells] = lambda row: row.cells,
) -> str:
    """A line for each run of rows that agree in all cells."""
    lines = [("", "replaced", "left alone, and why"), ("---",) * 3]
    for _, alike in groupby(rows, key=lambda row: (row.library, row.mode, cells(row))):
        first, *others = alike
        title = ", ".join([name(first), *(row.family for row in others)])
        lines.append((title, *_replaced_and_left(cells(first))))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _replaced_and_left(cells: Cells) -> tuple[str, str]:
    replaced, left = [], dict[str, list[str]]()
    for rewrite, cell in cells.items():
        if isinstance(cell, Law):
            replaced.append(f"`{rewrite}` {cell}")
        elif cell not in (NONE, WITH_HEAD, WITH_PROJECTIONS, IN_32_BITS):  # else nothing is left
            reason = cell if isinstance(cell, str) else f'"{cell.reason}"'
            left.setdefault(reason, []).append(f"`{rewrite}`")
    reasons = [f"{', '.join(names)}: {reason}" for reason, names in left.items()]
    return ", ".join(replaced), "; ".join(reasons)


def families() -> str:
    return markdown(
        FAMILIES,
        lambda row: f"{row.library}: {row.family}",
        lambda row: row.cells | {"DeferredLogits": row.deferred},
    )


def modes() -> str:
    def name(row: Row) -> str:
        way = "" if row.mode is whole_step else f", {row.mode.__name__.replace('_', ' ')}"
        return row.family + way

    return markdown(MODES, name)


if __name__ == "__main__":
    print(families(), modes(), sep="\n\n")
