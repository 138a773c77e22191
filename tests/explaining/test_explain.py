"""``python -m liger_fx explain``: text, page and errors."""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import re
from html.parser import HTMLParser
from unittest import mock

import pytest
import torch
from _torchtune_models import SIZES
from expecttest import assert_expected_inline
from torch import nn

from liger_fx.__main__ import main
from liger_fx.explaining import huggingface
from liger_fx.explaining.explanation import explain_subject
from liger_fx.explaining.render import as_html, as_text, in_units
from liger_fx.explaining.subject import Part, Request, Subject, cut_layers
from liger_fx.report import Place

pytestmark = pytest.mark.usefixtures("apply_all")

TINY = ["num_hidden_layers=4", "hidden_size=32", "intermediate_size=48", "vocab_size=128"]
TINY += ["num_attention_heads=4", "num_key_value_heads=2", "pad_token_id=0"]
LLAMA = ["--hf", "llama", "--batch", "2", "--seq", "16", "--dtype", "fp32", "--set", *TINY]


@pytest.fixture
def apply_all(monkeypatch):
    monkeypatch.setenv("LIGER_FX_POLICY", "all")


@pytest.fixture
def explain(capsys):
    """Runs the command and gives what it prints, without what depends on versions and time."""

    def run(*arguments: str, code: int = 0) -> str:
        assert main(["explain", *arguments]) == code
        printed = capsys.readouterr()
        return without_versions(printed.err if code else printed.out)

    return run


def without_versions(text: str) -> str:
    """And without the time that tracing took."""
    return re.sub(r"graph of .* ms", "graph", re.sub(r"\.py:\d+", ".py", text)).strip()


@pytest.fixture
def recipe(tmp_path):
    """A config as ``tune run`` takes it, of a model that takes no time."""

    def write(**keys) -> str:
        sizes = SIZES | {"num_layers": 3, "attn_dropout": 0.0}
        model = {"_component_": "torchtune.models.llama3_1.llama3_1", **sizes}
        loss = {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"}
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({"model": model, "loss": loss, "dtype": "fp32"} | keys))
        return str(path)

    return write


def test_a_hugging_face_model(explain):
    assert_expected_inline(
        explain(*LLAMA, "--dtype", "bf16", "--padding"),
        """\
LlamaForCausalLM, 39,200 parameters, bfloat16, batch 2 x 16 tokens, attention mask for padding
replaced: 1 x linear_cross_entropy, 4 x attention, 8 x rope, 8 x add_rms_norm, 1 x rms_norm, 4 x tiled_mlp, 1 x embedding

memory                                          without liger_fx  with liger_fx
logits, and what else projection and loss keep  8.26 KiB          10.01 KiB
gate, up and their product                      36.00 KiB         none
attention masks, as attention reads them        1.00 KiB          none

model.layers.0
  replaced  attention     self_attn at sdpa_attention.py in sdpa_attention_forward
  replaced  rope          self_attn at modeling_llama.py in apply_rotary_pos_emb
  replaced  rope          self_attn at modeling_llama.py in apply_rotary_pos_emb
  replaced  add_rms_norm  post_attention_layernorm at modeling_llama.py in forward
  replaced  rms_norm      input_layernorm at modeling_llama.py in forward
  replaced  tiled_mlp     mlp.down_proj at modeling_llama.py in forward

model.layers.1 to model.layers.3 (3 layers)
  replaced  attention     self_attn at sdpa_attention.py in sdpa_attention_forward
  replaced  rope          self_attn at modeling_llama.py in apply_rotary_pos_emb
  replaced  rope          self_attn at modeling_llama.py in apply_rotary_pos_emb
  replaced  add_rms_norm  input_layernorm at modeling_llama.py in forward
  replaced  add_rms_norm  post_attention_layernorm at modeling_llama.py in forward
  replaced  tiled_mlp     mlp.down_proj at modeling_llama.py in forward

around the layers
  replaced  linear_cross_entropy  loss_utils.py in fixed_cross_entropy
  replaced  add_rms_norm          model.norm at modeling_llama.py in forward
  replaced  embedding             model.embed_tokens at modeling_llama.py in forward
  deferred  logits                lm_head at modeling_llama.py in forward             returned: computed when they are read

Layers traced: 2 of 4; the others are built alike, and counts and bytes are for all of them.
The sizes are transformers' defaults for llama, but for what --set says: give --hf a folder with config.json to explain another model.
Memory is what is held when the forward is done: what is returned, and what Inductor keeps for the backward. What an op needs while it runs, such as one chunk of logits, is not counted.""",
    )


@pytest.fixture(scope="module")
def checkpointed(tmp_path_factory):
    """Text and page of a model with activation checkpoints."""
    html = tmp_path_factory.mktemp("page") / "page.html"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as text:
        patch.setenv("LIGER_FX_POLICY", "all")
        assert main(["explain", *LLAMA, "--checkpoint", "--html", str(html)]) == 0
    return without_versions(text.getvalue()), html.read_text()


def test_activation_checkpoints_hold_one_layer_at_a_time(checkpointed):
    text, _ = checkpointed
    assert_expected_inline(
        text.split("\n\n")[1],
        """\
memory                                              without liger_fx  with liger_fx
logits, and what else projection and loss keep      16.26 KiB         20.01 KiB
gate, up and their product, of one layer at a time  18.00 KiB         none
attention masks, as attention reads them            2.00 KiB          none""",
    )


def test_counts_and_bytes_do_not_depend_on_how_many_layers_are_traced(explain):
    llama = [*LLAMA, "num_hidden_layers=3"]
    two, three = (explain(*llama, "--layers", n).splitlines() for n in ("2", "3"))
    differ = [(a, b) for a, b in zip(two, three, strict=True) if a != b]
    assert [b for _, b in differ] == ["Layers traced: all 3."]
    assert differ[0][0].startswith("Layers traced: 2 of 3; the others are built alike")
    assert "replaced: 1 x linear_cross_entropy, 3 x attention, 6 x rope" in two[1]


def test_a_refusal_says_why(explain, monkeypatch):
    monkeypatch.setenv("LIGER_FX_POLICY", "auto")
    monkeypatch.setattr("liger_fx.policy.BUSY", 0.0)
    text = explain(*LLAMA)
    assert re.search(r"left alone +tiled_mlp +mlp.* auto: 0\.8\d+x the speed at worst", text)
    assert "left alone: " in text.splitlines()[1] and " 4 x tiled_mlp" in text.splitlines()[1]
    assert text.count("ot on a GPU: decided as on sm90") == 1


def test_a_recipe_of_torchtune(explain, recipe):
    text = explain("--torchtune", recipe(), "--batch", "2", "--seq", "16")
    text = text.replace(recipe(), "recipe.yaml")
    assert_expected_inline(
        text,
        """\
recipe.yaml: TransformerDecoder, 31,648 parameters, float32, batch 2 x 16 tokens
replaced: 6 x rope, 3 x add_rms_norm, 4 x rms_norm, 3 x tiled_mlp, 1 x linear_cross_entropy; left alone: 3 x attention

memory                                          without liger_fx  with liger_fx
logits, and what else projection and loss keep  20.62 KiB         20.38 KiB
gate, up and their product                      54.00 KiB         none

layers.0 to layers.2 (3 layers)
  replaced    2 x rope      attn.pos_embeddings at _position_embeddings.py in forward
  replaced    add_rms_norm  mlp_norm at functional.py in rms_norm
  replaced    rms_norm      sa_norm at functional.py in rms_norm
  replaced    tiled_mlp     mlp.w2 at feed_forward.py in forward
  left alone  attention     attn at attention_utils.py in _attention_call              attention runs in torch.float32; flash and cuDNN attention take bf16 and fp16

around the layers
  replaced  linear_cross_entropy  loss_fn at ce_chunked_output_loss.py in forward
  replaced  rms_norm              decoder.norm at functional.py in rms_norm

Layers traced: 1 of 3, one of each kind, each on its own, and the head with the loss, as the recipes of liger_fx compile them; counts and bytes are for all layers.
Memory is what is held when the forward is done: what is returned, and what Inductor keeps for the backward. What an op needs while it runs, such as one chunk of logits, is not counted.""",
    )


def test_a_distillation(explain, recipe):
    model = {"_component_": "torchtune.models.llama2.llama2", **SIZES}
    config = recipe(
        model=model,
        teacher_model=model | {"embed_dim": 64},
        kd_loss={"_component_": "torchtune.modules.loss.ForwardKLWithChunkedOutputLoss"},
        kd_ratio=0.3,
    )
    text = explain("--torchtune", config, "--batch", "2", "--seq", "16")
    assert re.search(r"replaced +linear_kl ", text)
    assert "The layers of a teacher or a reference model are not listed." in text


def test_a_preference_loss(explain, recipe):
    config = recipe(loss={"_component_": "torchtune.rlhf.loss.DPOLoss"})
    assert re.search(
        r"replaced +linear_logprobs", explain("--torchtune", config, "--batch", "2", "--seq", "16")
    )


def test_options_of_the_recipe(explain, recipe):
    config = recipe(liger_fx={"disable": ["rope"], "tiled_mlp": {"tile_tokens": 8}})
    text = explain("--torchtune", config, "--batch", "2", "--seq", "16")
    assert re.search(r"left alone +2 x rope .* disabled by option", text)


def test_files_that_cannot_be_read_or_written(explain, recipe, tmp_path):
    assert "No such file" in explain(*LLAMA, "--html", str(tmp_path / "none" / "x.html"), code=1)
    (tmp_path / "broken.yaml").write_text("model: [")
    assert "broken.yaml is not YAML" in explain(
        "--torchtune", str(tmp_path / "broken.yaml"), code=1
    )
    assert "no dtype is called 'int4'" in explain("--torchtune", recipe(dtype="int4"), code=1)
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not JSON" in explain("--hf", str(tmp_path), code=1)


def test_folders_and_files(explain, tmp_path):
    settings = dict(setting.split("=") for setting in TINY)
    config = {"model_type": "llama"} | {name: int(value) for name, value in settings.items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    request = Request(2, 16, False, False, "fp32", None, {"num_hidden_layers": 2})
    for given in (tmp_path, tmp_path / "config.json"):
        found = huggingface.subject(str(given), request)
        assert found.layers == ["model.layers.0", "model.layers.1"]
        assert found.parts[0].call.config.intermediate_size == 48
    (tmp_path / "config.json").write_text("{}")
    assert "has no model_type" in explain("--hf", str(tmp_path), code=1)
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    assert "--set quantization_config=null" in explain("--hf", str(tmp_path), code=1)


@pytest.mark.parametrize(
    "arguments, near, known",
    [
        (["--hf", "lama"], "llama", "qwen3"),
        (["--hf", "LlamaForCausalLm"], "LlamaForCausalLM", "Qwen3ForCausalLM"),
        (["--hf", "llama", "--set", "hidden=8"], "hidden_size", "vocab_size"),
        (["--torchtune", "llama3_2/1B_ful"], "llama3_2/1B_full", "mistral/7B_lora"),
    ],
)
def test_wrong_names(explain, arguments, near, known):
    error = explain(*arguments, code=1)
    assert near in error.split("Known: ")[0]
    assert known in error.split("Known: ")[1]


def test_configs_that_cannot_be_built(explain, recipe):
    error = explain("--torchtune", "mistral/7B_full_ppo_low_memory", code=1)
    assert "has no `model:`: expected a config of a recipe that trains one model" in error
    broken = recipe(model={"_component_": "torchtune.models.llama3.llama3", "num_layers": 1})
    assert "`model:` cannot be built on meta" in explain("--torchtune", broken, code=1)
    error = explain("--hf", "llama", "--set", "num_attention_heads=7", code=1)
    assert error.startswith("error: transformers cannot build this model")
    # torchtune's table of angles ends there.
    error = explain("--torchtune", recipe(), "--batch", "2", "--seq", "64", code=1)
    assert "the model cannot be traced on meta tensors: TorchRuntimeError: " in error


@pytest.mark.parametrize(
    "library, package", [("huggingface", "transformers"), ("torchtune", "torchtune")]
)
def test_a_missing_library_is_named_with_its_extra(explain, library, package):
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    model = ["--hf", "llama"] if library == "huggingface" else ["--torchtune", "llama3_2/1B_full"]
    with (
        mock.patch.dict("sys.modules", {package: None}),
        mock.patch("builtins.__import__", without),
    ):
        error = explain(*model, code=1)
    assert f'pip install "liger_fx[{library}]"' in error


def test_settings_and_numbers_are_checked(capsys):
    for arguments in (["--set", "x"], ["--batch", "0"], ["--dtype", "int8"]):
        with pytest.raises(SystemExit):
            main(["explain", "--hf", "llama", *arguments])
    with pytest.raises(SystemExit):
        main(["explain", "--torchtune", "llama3_2/1B_full", "--padding"])
    assert "--padding and --layers go with --hf" in capsys.readouterr().err


class Page(HTMLParser):
    """Raises AssertionError for tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_says_what_the_text_says(checkpointed):
    text, written = checkpointed
    page = Page(written)
    said = " ".join(re.sub(r"\.py:\d+", ".py", page.text).split())
    for line in text.splitlines():
        for part in re.split(r" {2,}", line):
            assert part in said or part == "memory"
    assert "<script" not in written and "http" not in written
    assert "One rewrite: " in page.text


def test_names_are_escaped_on_the_page():
    subject = Subject("<b>bold</b> & $title", ["<i>"], [], [], {})
    assert "<b>bold</b> & $title" in Page(as_html(explain_subject(subject))).text


# -- bytes -----------------------------------------------------------------------------------------


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(8, 64, bias=False)

    def forward(self, hidden, labels):
        return nn.functional.cross_entropy(self.output(hidden).float(), labels)


def rows(step, *args, options=None):
    part = Part(step, args, {}, lambda place: [place])
    explanation = explain_subject(Subject("", [], [part], [], options or {}))
    return {kind.split(",")[0]: tuple(sizes) for kind, *sizes in explanation.memory}


def meta(*size, dtype=torch.float32, grad=True):
    return torch.empty(*size, dtype=dtype, device="meta", requires_grad=grad)


def test_bytes_of_logits_and_of_the_gradients_that_replace_them():
    labels = meta(32, dtype=torch.long, grad=False)
    before, after = rows(Head().to("meta"), meta(32, 8), labels)["logits"]
    logits, maxima_and_log_sums, loss_and_count = 32 * 64 * 4, 2 * 32 * 4, 2 * 4
    assert before == logits + maxima_and_log_sums + loss_and_count
    gradients = (32 * 8 + 64 * 8) * 4  # of hidden states and weight
    assert gradients < after <= gradients + 4 * 4  # the loss and a few numbers


def test_bytes_of_gate_up_and_product():
    def step(gate, up):
        return (nn.functional.silu(gate) * up).sum()

    def projected(x, w1, w2, w3):
        linear = nn.functional.linear
        return linear(nn.functional.silu(linear(x, w1)) * linear(x, w2), w3).sum()

    assert rows(step, meta(4, 8), meta(4, 8)) == {}, "inputs are made elsewhere"
    found = rows(projected, meta(4, 8), meta(16, 8), meta(16, 8), meta(8, 16))
    assert found["gate"] == (3 * 4 * 16 * 4, 0)


def test_masks_count_once_and_as_they_are_read():
    def step(x, mask):
        attend = nn.functional.scaled_dot_product_attention
        return attend(attend(x, x, x, mask), x, x, mask).sum()

    x = meta(2, 4, 16, 8, dtype=torch.bfloat16)
    boolean = meta(2, 1, 16, 16, dtype=torch.bool, grad=False)
    assert rows(step, x, boolean)["attention masks"] == (2 * 16 * 16 * 2,) * 2
    additive = meta(2, 1, 16, 16, dtype=torch.bfloat16, grad=False)
    assert rows(step, x, additive)["attention masks"] == (2 * 16 * 16 * 2,) * 2


def test_what_cannot_be_measured_is_said(explain):
    failure = RuntimeError("no such\nop\nfrom somewhere")
    with mock.patch("liger_fx.explaining.memory._forward", side_effect=failure):
        text = explain(*LLAMA)
    assert text.endswith("Memory could not be measured: RuntimeError: no such op")
    assert "4 x tiled_mlp" in text


# -- layers ----------------------------------------------------------------------------------------


class Decoder(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, size) for size in sizes)


def test_each_kind_of_layer_is_traced_and_stands_for_its_like():
    cut = cut_layers(model := Decoder([4, 4, 4, 8, 4, 4, 4, 8]), None)
    assert cut.stand_ins == [[0], [1], [2, 4, 5, 6], [3, 7]]
    assert len(model.layers) == 4
    assert [p.module for p in cut.places(Place("layers.3.x"))] == ["layers.3.x", "layers.7.x"]
    assert cut.places(Place("sublayers.3")) == [Place("sublayers.3")]
    assert cut_layers(Decoder([4]), None).stand_ins == [[0]]
    assert cut_layers(Decoder([4, 4, 4]), 1).stand_ins == [[0, 1, 2]]
    assert cut_layers(nn.Linear(2, 2), None) is None


def test_numbers_tell_kinds_apart_unless_each_layer_has_its_own():
    model = Decoder([4] * 6)
    for index, layer in enumerate(model.layers):
        layer.index, layer.rotates = index, int(index != 3)
    assert cut_layers(model, None).stand_ins == [[0], [1], [2, 4, 5], [3]]


def test_kinds_that_are_not_traced_are_said():
    cut = cut_layers(Decoder([4] * 20 + [8]), None)
    assert cut.stand_ins[-1][-1] == 20
    assert "some of the others are built differently" in cut.fact()


def test_sizes_are_readable():
    sizes = (0, 999, 1000, 1536, 5 << 20, 1010 << 20, 3 << 29)
    readable = ["none", "999 B", "0.98 KiB", "1.50 KiB", "5.00 MiB", "0.99 GiB", "1.50 GiB"]
    assert [in_units(size) for size in sizes] == readable


def test_a_model_with_nothing_to_replace():
    part = Part(nn.Linear(2, 2).to("meta"), [meta(1, 2)], {}, lambda place: [place])
    text = as_text(explain_subject(Subject("linear", [], [part], [], {})))
    assert "nothing to replace" in text
    assert "memory" not in text
