"""`liger_fx.huggingface.compile(model, unpad=True)`: layers see no padding, and nobody else sees a
difference."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _util import relative_error
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from _trainer import language_model, settings, tokenizer  # noqa: E402
from test_huggingface import run  # noqa: E402
from test_huggingface_layers import assert_equal, compiled, gradients  # noqa: E402
from test_masks_huggingface import SMALL, WINDOW  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from liger_fx import huggingface, inner, rows, unpadding  # noqa: E402
from liger_fx.offload import Offload  # noqa: E402

integrations = pytest.mark.integrations
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16)
MLA = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": dict(sliding_window=WINDOW),
    "gemma3_text": dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]),
    "qwen3_moe": dict(num_experts=4) | EXPERTS,
    "gpt2": dict(n_embd=32, n_head=4, n_layer=2, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0),
    # Those of which attention runs under a mask: heads of two sizes, and a model that keeps keywords
    # from its attention.
    "deepseek_v3": MLA
    | EXPERTS
    | dict(num_key_value_heads=4, n_routed_experts=4, n_group=1, topk_group=1),
    "nemotron": {},
}
SIZE = 24
LENGTHS = torch.tensor([24, 3, 11, 17])


@pytest.fixture(autouse=True)
def small_unit(monkeypatch):
    monkeypatch.setattr(rows, "UNIT", 8)


@pytest.fixture
def seen(monkeypatch):
    """How many tokens each batch has in the layers."""
    found = []
    as_row = unpadding._Hooks._as_row

    def counted(self: Any, *args: Any) -> Any:
        row = as_row(self, *args)
        found.append(row["position_ids"].numel())
        return row

    monkeypatch.setattr(unpadding._Hooks, "_as_row", counted)
    return found


def tiny(name: str = "llama", **settings: Any) -> Any:
    torch.manual_seed(0)
    return other(name, **MODELS[name] | settings).train()


def padded(side: str = "right", size: int = SIZE) -> dict[str, Any]:
    tokens = torch.randint(1, 64, (4, SIZE), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(SIZE) < LENGTHS[:, None]).long()
    if side == "left":
        mask = mask.flip(1)
    if side == "holes":
        mask[0, 5:8] = 0
    tokens, mask = tokens[:, :size], mask[:, :size]
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, 1:][mask[:, :-1] == 0] = -100
    given = {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}
    return given | {"labels": labels, "use_cache": False}


def unpadded(model: Any, **options: Any) -> Any:
    return compiled(model, unpad=True, **options)


# -- fires -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "side"),
    [
        *(("llama", side) for side in ("right", "left")),
        ("gemma3_text", "left"),
        ("nemotron", "right"),
        *(
            pytest.param(name, side, marks=pytest.mark.slow)
            for name in MODELS
            for side in ("right", "left")
        ),
    ],
)
def test_equals_the_padded_batch(name, side, seen):
    given = padded(side)
    actual = gradients(unpadded(tiny(name)), given)
    assert_equal(actual, gradients(tiny(name), given), 1e-4)
    assert seen == [56]  # of 96, 55 of them valid
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("reentrant", "offload"),
    [
        (True, False),
        *(pytest.param(*both, marks=pytest.mark.slow) for both in ((0, 1), (0, 0), (1, 1))),
    ],
)
def test_checkpoints(reentrant, offload, seen, monkeypatch):
    monkeypatch.setattr(huggingface, "Offload", functools.partial(Offload, least=1))
    given = padded()
    model = tiny("gemma3_text")
    model.gradient_checkpointing_enable({"use_reentrant": bool(reentrant)})
    actual = gradients(unpadded(model, offload=bool(offload)), given)
    assert_equal(actual, gradients(tiny("gemma3_text"), given), 1e-5)
    assert seen == [56]


def test_every_rewrite_under_inductor(seen):
    given = padded()
    model = unpadded(tiny(tie_word_embeddings=True), inner="inductor", policy="all")
    assert_equal(gradients(model, given), gradients(tiny(tie_word_embeddings=True), given), 1e-5)
    assert seen == [56]


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_autocast(name, seen):
    """No less exact than the padded batch."""
    given = padded()
    exact = gradients(tiny(name).double(), given)
    found = [gradients(prepare(tiny(name)), given, bf16=True) for prepare in (unpadded, compiled)]
    errors = [sum(relative_error(each[n], exact[n]) for n in exact) for each in found]
    assert errors[0] <= 1.1 * errors[1] and seen == [56]


def test_one_graph_of_a_form_for_all_numbers_of_tokens(seen, monkeypatch):
    """A module's floats stay numbers: beside a GPU, Inductor would build C++ kernels of them."""
    monkeypatch.setattr(rows, "UNIT", 1)
    inputs: list[Any] = []
    compile_rewritten = inner.compile_rewritten

    def spy(gm: Any, example_inputs: Any, *rest: Any) -> Any:
        inputs.extend(example_inputs)
        return compile_rewritten(gm, example_inputs, *rest)

    monkeypatch.setattr(inner, "compile_rewritten", spy)
    model = unpadded(tiny())
    for size in (24, 20, 12, 18):
        given = padded(size=size)
        assert_equal(gradients(model, given), gradients(tiny(), given), 1e-5)
    assert seen == [55, 51, 38, 49]
    assert counters["stats"]["unique_graphs"] == 2  # a layer, and the last norm
    assert all(x.dim() for x in inputs if isinstance(x, Tensor))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_no_mask_of_all_tokens_by_all_tokens(name):
    shapes = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            shapes.update(tuple(x.shape) for x in tree_leaves(out) if isinstance(x, Tensor))
            return out

    model = tiny(name)
    unpadding.leave_out_padding(model, model)
    with Seen():
        model(**padded())
    assert (1, 56, 4, 8) in shapes
    assert not any(sizes[-2:] == (56, 56) for sizes in shapes)


def test_a_mask_where_the_gpu_has_no_kernel(seen, monkeypatch):
    monkeypatch.setattr(unpadding, "_has_kernel", lambda device: False)
    given = padded()
    assert_equal(gradients(unpadded(tiny()), given), gradients(tiny(), given), 1e-5)
    assert seen == [56]


@pytest.mark.parametrize("positions", ["[s]", "[b, s]"])
def test_positions_that_are_given(positions, seen):
    given = padded("left")
    if positions == "[b, s]":
        given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    else:
        given["position_ids"] = torch.arange(3, SIZE + 3)[None]
    assert_equal(gradients(unpadded(tiny()), given), gradients(tiny(), given), 1e-5)
    assert seen == [56]


def test_embeddings_that_are_given(seen):
    found = []
    for prepare in (unpadded, lambda model: model):
        model, given = prepare(tiny()), padded()
        tokens = given.pop("input_ids")
        given["inputs_embeds"] = model.get_input_embeddings()(tokens)
        found.append(gradients(model, given))
    assert_equal(*found, 1e-5)
    assert seen == [56]


def test_hidden_states_of_padding_are_zero():
    given = padded("left")
    model, stock = unpadded(tiny()), tiny()
    rows, wanted = (m.model(**given | {"labels": None}).last_hidden_state for m in (model, stock))
    valid = given["attention_mask"] == 1
    torch.testing.assert_close(rows[valid], wanted[valid])
    assert not rows[~valid].any()


def test_rows_without_a_token(seen):
    given = padded()
    given["attention_mask"][1] = 0
    given["labels"][1] = -100
    assert_equal(gradients(unpadded(tiny()), given), gradients(tiny(), given), 1e-5)
    assert seen == [56]


def test_padding_between_tokens(seen):
    given = padded("holes")
    assert_equal(gradients(unpadded(tiny()), given), gradients(tiny(), given), 1e-5)
    assert seen == [56]


def test_a_copy_has_hooks_of_its_own(seen):
    model = unpadded(tiny())
    other, given = copy.deepcopy(model), padded()
    assert_equal(gradients(other, given), gradients(model, given), 1e-6)
    assert seen == [56, 56]


# -- beginnings that sequences share ---------------------------------------------------------------


def answers(side: str = "right", *, prompts: bool = True) -> dict[str, Any]:
    """Three answers to each of two prompts, one of the answers twice. prompts: have labels too."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 64, (6, SIZE), generator=generator)
    tokens[1, :10] = tokens[2, :10] = tokens[0, :10]  # the prompt
    tokens[2, :14] = tokens[1, :14]
    tokens[4, :5] = tokens[3, :5]
    tokens[5] = tokens[4]
    lengths = torch.tensor([24, 18, 20, 16, 12, 12])
    mask = (torch.arange(SIZE) < lengths[:, None]).long()
    if side == "left":  # as long before a prompt as the longest answer makes it
        tokens = torch.cat((torch.zeros(6, 4, dtype=torch.int64), tokens), 1)
        mask = torch.cat((torch.zeros(6, 4, dtype=torch.int64), mask), 1)
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, 1:][mask[:, :-1] == 0] = -100
    if not prompts:
        labels[:3, :10] = labels[3:, :5] = -100
    given = {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}
    return given | {"labels": labels, "use_cache": False}


DIFFERENT = 24 + 8 + 6 + 16 + 7  # of 102 tokens


@pytest.mark.parametrize(
    ("name", "side", "prompts"),
    [
        ("llama", "right", True),
        ("llama", "left", False),
        ("mistral", "right", True),
        ("nemotron", "right", True),
        *(
            pytest.param(name, side, True, marks=pytest.mark.slow)
            for name in MODELS
            for side in ("right", "left")
        ),
    ],
)
def test_a_prompt_goes_through_the_layers_once(name, side, prompts, seen):
    given = answers(side, prompts=prompts)
    actual = gradients(unpadded(tiny(name)), given)
    assert_equal(actual, gradients(tiny(name), given), 1e-4)
    assert seen == [-(-DIFFERENT // 8) * 8]
    assert not counters["graph_break"]


def test_trainers_callback(seen):
    """By layers, few as they are."""
    arguments = inspect.signature(huggingface.compile).parameters.values()
    named = {each.name for each in arguments if each.kind is each.KEYWORD_ONLY}
    assert named == huggingface.OF_LAYERS
    model = tiny()
    callback = huggingface.LigerFxCallback(unpad=True, inner="aot_eager")
    callback.on_init_end(None, None, None, model=model)
    assert_equal(gradients(model, answers()), gradients(tiny(), answers()), 1e-5)
    assert seen == [64]


def test_prompts_without_a_mask(seen):
    given = answers() | {"attention_mask": None}
    given["labels"] = given["input_ids"]
    assert_equal(gradients(unpadded(tiny()), given), gradients(tiny(), given), 1e-5)
    assert seen == [96]  # zeros behind an answer are tokens: 24 + 14 + 10 + 24 + 19


@pytest.mark.parametrize("reentrant", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_prompts_in_checkpoints_under_inductor(reentrant, seen):
    given = answers()
    model = tiny("mistral")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model = unpadded(model, inner="inductor", policy="all")
    assert_equal(gradients(model, given), gradients(tiny("mistral"), given), 1e-5)
    assert seen == [64]


def test_one_graph_for_all_numbers_of_answers(seen):
    model = unpadded(tiny())
    for rows_of_batch in (5, 3, 6):
        given = {n: x[:rows_of_batch] for n, x in answers().items() if isinstance(x, Tensor)}
        assert_equal(gradients(model, given), gradients(tiny(), given), 1e-5)
    assert seen == [64, 40, 64]
    assert counters["stats"]["unique_graphs"] == 2  # a layer, and the last norm


def test_equal_tokens_at_other_positions_are_others(seen):
    given = answers()
    given["position_ids"] = torch.arange(SIZE).repeat(6, 1)
    given["position_ids"][1:3] += 7
    assert_equal(gradients(unpadded(tiny()), given), gradients(tiny(), given), 1e-5)
    assert seen == [-(-(DIFFERENT + 10) // 8) * 8]


@pytest.mark.parametrize("drops", ["module", "attention"])
def test_what_drops_at_random_drops_in_each_sequence(drops, seen, caplog):
    model = tiny(**{"attention_dropout": 0.5} if drops == "attention" else {})
    if drops == "module":
        model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, nn.Dropout(0.5))
    unpadding.leave_out_padding(model, model)
    torch._logging.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING, "liger_fx"):
        model(**answers())
    assert seen == [104]
    assert "sequences do not share the tokens that they begin with" in caplog.text
    model.eval()(**answers())
    assert seen == [104, 64]
    model.model.layers[0].train()  # alone
    model(**answers())
    assert seen == [104, 64, 104]


def test_embeddings_that_are_given_are_not_shared(seen):
    model, given = tiny(), answers()
    unpadding.leave_out_padding(model, model)
    given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids"))
    model(**given)
    assert seen == [104]


def test_a_few_equal_tokens_are_not_worth_it(seen):
    model, given = tiny(), padded()
    unpadding.leave_out_padding(model, model)
    given["input_ids"][:, 0] = 1
    model(**given)
    assert seen == [56]


@pytest.mark.parametrize("seed", range(8))
def test_any_sequences(seed, seen):
    """Of an alphabet of two tokens: beginnings of all lengths, sequences within others."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 3, (8, 12), generator=generator)
    lengths = torch.randint(0, 13, (8, 1), generator=generator)
    mask = (torch.arange(12) < lengths).long()
    labels = tokens.masked_fill(mask == 0, -100)
    given = {"input_ids": tokens, "attention_mask": mask, "labels": labels, "use_cache": False}
    model, stock = tiny(), tiny()
    unpadding.leave_out_padding(model, model)
    assert_equal(gradients(model, given), gradients(stock, given), 1e-5)
    assert seen


# -- leaves alone ----------------------------------------------------------------------------------


def leaves(given: dict[str, Any], seen: list[int], name: str = "llama") -> None:
    assert_equal(gradients(unpadded(tiny(name)), given), gradients(tiny(name), given), 1e-5)
    assert seen == []


def test_leaves_labels_of_padding(seen, caplog):
    given = padded()
    given["labels"] = given["input_ids"]
    with caplog.at_level(logging.WARNING, "liger_fx"):
        torch._logging.warning_once.cache_clear()
        leaves(given, seen)
    assert "labels that are not ignored are of padding" in caplog.text


def test_leaves_a_label_predicted_at_padding(seen):
    given = padded("left")
    given["labels"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    leaves(given, seen)


@pytest.mark.parametrize("wrapped", [False, True])
def test_leaves_labels_that_have_no_name(wrapped, seen):
    """Given by position; or to a ``forward`` that names nothing."""
    given, losses = padded(), []
    for prepare in (lambda model: model, unpadded):
        model = prepare(tiny())
        forward = model.forward
        if wrapped:
            model.forward = lambda *args, forward=forward: forward(*args)
        call = [given["input_ids"], given["attention_mask"], None, None, None, given["input_ids"]]
        losses.append(model(*call).loss)
    torch.testing.assert_close(*losses)
    assert seen == []


def test_leaves_padding_between_tokens_in_a_window(seen):
    leaves(padded("holes"), seen, "mistral")


def test_leaves_batches_without_padding(seen):
    given = padded()
    given["attention_mask"] = torch.ones_like(given["attention_mask"])
    given["labels"] = given["input_ids"]
    leaves(given, seen)
    leaves(given | {"attention_mask": None}, seen)


@pytest.mark.parametrize(
    "wanted",
    [{"output_hidden_states": True}, {"output_attentions": True}],
    ids=lambda w: next(iter(w)),
)
def test_leaves_what_each_layer_returns(wanted, seen):
    leaves(padded() | wanted, seen)


def test_leaves_noise_that_depends_on_the_size_of_a_batch(seen):
    model = unpadded(tiny())
    model.get_input_embeddings().neftune_noise_alpha = 5.0
    assert_equal(gradients(model, padded()), gradients(tiny(), padded()), 1e-5)
    assert seen == []


def test_leaves_packed_sequences_that_positions_tell_of(seen):
    given = answers() | {"attention_mask": None}
    given["position_ids"] = torch.arange(SIZE).remainder(8).repeat(6, 1)
    leaves(given, seen)


def test_leaves_a_mask_of_four_dimensions(seen):
    given = padded()
    causal = torch.ones(SIZE, SIZE, dtype=torch.bool).tril()
    given["attention_mask"] = (given["attention_mask"][:, None, None] == 1) & causal
    leaves(given, seen)


def test_leaves_a_mask_of_integers_to_pytorch():
    """Which refuses it: int64 tells of documents only where liger_fx has made it."""
    given = padded()
    given["attention_mask"] = given["attention_mask"][:1, None, None]
    with pytest.raises(RuntimeError, match="attn_mask dtype to be bool or float"):
        gradients(unpadded(tiny()), given)


def test_leaves_generation(seen):
    given = {name: padded("left")[name] for name in ("input_ids", "attention_mask")}
    wanted, found = (
        prepare(tiny()).eval().generate(**given, max_new_tokens=4, do_sample=False)
        for prepare in (lambda model: model, unpadded)
    )
    assert torch.equal(wanted, found)


# -- refuses ---------------------------------------------------------------------------------------


def other(name: str, **settings: Any) -> Any:
    config = AutoConfig.for_model(name, **SMALL | dict(num_hidden_layers=2) | settings)
    return AutoModelForCausalLM.from_config(config)


LFM = dict(layer_types=["conv", "full_attention"])
REFUSED = {
    "eager": (lambda: _eager(tiny()), "its attention is 'eager', expected 'sdpa'"),
    "conv": (lambda: other("lfm2", **LFM), "layers of kind conv let tokens meet elsewhere"),
    "opt": (
        lambda: other("opt", ffn_dim=32, word_embed_proj_dim=32),
        "embed_positions reads the mask of a batch",
    ),
    "stablelm": (
        lambda: other("stablelm"),
        "its attention is not called through transformers' AttentionInterface",
    ),
    "angles": (
        lambda: tiny(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)),
        "the angles of rotary_emb depend on the length of a batch",
    ),
    "decoder": (lambda: tiny().model, "it has no decoder below its head"),
}


def _eager(model: Any) -> Any:
    model.config._attn_implementation = "eager"
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    make, reason = REFUSED[case]
    with pytest.raises(ValueError, match=reason):
        huggingface.compile(make(), unpad=True)


def test_refuses_a_convolution_and_what_is_not_causal():
    for module, reason in ((nn.Conv1d(2, 2, 1), "convolution mixer"), (nn.Module(), "not causal")):
        model = tiny()
        module.is_causal = False  # type: ignore[assignment]
        model.model.mixer = module
        with pytest.raises(ValueError, match=reason):
            huggingface.compile(model, unpad=True)


# -- whole loops -----------------------------------------------------------------------------------


@integrations
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}], ids=str)
def test_trainer(settings, tmp_path, seen, monkeypatch):
    monkeypatch.setattr(rows, "UNIT", 1)
    lengths = (16, 14, 12, 9)
    eager, fused = (
        run(tmp_path, by_layers=on, unpad=on, lengths=lengths, **settings) for on in (False, True)
    )
    assert fused.losses == pytest.approx(eager.losses, rel=1e-5)
    assert seen
    for name, update in fused.updates.items():
        assert relative_error(update, eager.updates[name]) <= 1e-3, name


@integrations
def test_adapters(seen, monkeypatch):
    """PEFT calls the model below it without its hooks."""
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: False)

    def adapted() -> nn.Module:
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
        torch.manual_seed(1)
        return peft.get_peft_model(language_model(), config)

    given = padded()
    found = [gradients(prepare(adapted()), given) for prepare in (unpadded, lambda model: model)]
    assert_equal(*found, 1e-5)
    assert seen == [56]
    given["labels"] = given["input_ids"]
    gradients(unpadded(adapted()), given)
    assert seen == [56]


@integrations
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trl(kind, tmp_path, seen, monkeypatch):
    """Losses, and what a trainer logs of logits."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    monkeypatch.setattr(rows, "UNIT", 1)
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> str:
        return " ".join(map(str, torch.randint(3, 500, (count,), generator=generator).tolist()))

    texts = [
        {"prompt": words(3 + i % 5), "chosen": words(4 + 3 * (i % 4)), "rejected": words(5 + i % 3)}
        for i in range(12)
    ]
    if kind == "SFT":
        texts = [{"prompt": text["prompt"], "completion": text["chosen"]} for text in texts]
    config, trainer = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")

    def train(prepare: Callable[[Any], Any]) -> list[dict[str, float]]:
        models = {"model": language_model(max_position_embeddings=64)}
        if kind == "DPO":
            models["ref_model"] = language_model(max_position_embeddings=64)
        trained = trainer(
            **{name: prepare(model) for name, model in models.items()},
            args=config(**settings(tmp_path, max_length=48, bf16=False)),
            train_dataset=datasets.Dataset.from_list(texts),
            processing_class=tokenizer(),
        )
        trained.train()
        timed = ("runtime", "per_second", "flos")
        kept = [
            {k: v for k, v in h.items() if not k.endswith(timed)} for h in trained.state.log_history
        ]
        return kept

    eager, fused = train(lambda model: model), train(unpadded)
    assert seen
    for one, other in zip(eager, fused, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


@integrations
def test_trl_grpo(tmp_path, seen, monkeypatch):
    """Four answers to a prompt, which goes through the layers once."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    monkeypatch.setattr(rows, "UNIT", 1)
    prompts = [{"prompt": " ".join(str(3 + 7 * i + j) for j in range(12 + i))} for i in range(4)]

    def train(prepare: Callable[[Any], Any]) -> list[dict[str, float]]:
        chosen = dict(num_generations=4, max_completion_length=6, bf16=False)
        chosen |= dict(per_device_train_batch_size=4)
        trained = trl.GRPOTrainer(
            prepare(language_model(max_position_embeddings=64)),
            reward_funcs=lambda completions, **_: [len(set(text)) / 10 for text in completions],
            args=trl.GRPOConfig(**settings(tmp_path, **chosen)),
            train_dataset=datasets.Dataset.from_list(prompts),
            processing_class=tokenizer(),
        )
        trained.train()
        names = "loss", "grad_norm", "reward", "entropy"
        return [{n: h[n] for n in names if n in h} for h in trained.state.log_history]

    eager, fused = train(lambda model: model), train(unpadded)
    assert seen and max(seen) < 4 * (12 + 6)
    for one, other in zip(eager, fused, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


# -- every architecture ----------------------------------------------------------------------------

NARROW = SMALL | EXPERTS | dict(num_hidden_layers=2, intermediate_size=48, sliding_window=5)
NARROW |= dict(max_position_embeddings=64, n_embd=32, n_head=4, n_layer=2, n_positions=64)
NARROW |= dict(num_experts=4, num_local_experts=4, n_routed_experts=4, n_group=1, topk_group=1)
NARROW |= dict(bos_token_id=1, eos_token_id=2, ffn_dim=48, word_embed_proj_dim=32, rotary_dim=8)


def narrow(name: str) -> Any:
    """A model of a few parameters. Raises whatever its configuration does not like of that."""
    usual = AutoConfig.for_model(name)
    sizes = {key: value for key, value in NARROW.items() if getattr(usual, key, None) is not None}
    if "kv_lora_rank" in vars(usual):
        sizes = {k: v for k, v in sizes.items() if k not in ("head_dim", "num_key_value_heads")}
        sizes |= MLA | dict(num_key_value_heads=4)
    config = AutoConfig.for_model(name, **sizes)
    for key, value in vars(config).items():
        if isinstance(value, float) and "drop" in key:
            setattr(config, key, 0.0)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if parameters > 5e6:
        raise ValueError(f"{parameters} parameters")
    return AutoModelForCausalLM.from_config(config).train()


@pytest.mark.slow
def test_every_architecture(seen):
    """Of those that can be built small, that say the same of a batch twice, and do not refuse."""
    same, wrong = [], []
    for name in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            torch.manual_seed(0)
            model = narrow(name)
            given = {side: padded(side) for side in ("right", "left")} | {"answers": answers()}
            expected = {side: gradients(model, given[side]) for side in given}
            for side in given:
                assert_equal(gradients(model, given[side]), expected[side], 1e-5)
            unpadding.leave_out_padding(model, model)
        except Exception:
            continue
        seen.clear()
        try:
            for side in given:
                assert_equal(gradients(model, given[side]), expected[side], 1e-3)
            assert seen == [56, 56, 64]
            same.append(name)
        except Exception as error:
            wrong.append((name, str(error)))
    assert not wrong
    assert len(same) > 60
