"""Every bad input that a check finds, and the sentence it gives.

``python tests/unit/bad_recipes.py`` writes them to ``tests/bad_inputs.md``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "tests" / "bad_inputs.md"
SMALL = "tests/models/small"


@dataclass(frozen=True)
class Case:
    """
    A bad input: recipe text, or ``path`` of a recipe; and the code it must give.

    ``config`` is written to ./model/config.json, beside a tokenizer without chat
    template if ``tokenizer`` says so.
    """

    title: str
    code: str
    recipe: str = ""
    path: str | None = None
    model: str | None = None
    target: str | None = None
    severity: str = "error"
    config: dict | None = None
    tokenizer: bool = False


def slider(*lines: str) -> str:
    """A recipe of one SliderQuant stage with these fields."""
    fields = "\n".join(f"      {line}" for line in lines)
    return f"quant_stage:\n  quant_modifiers:\n    SliderQuantModifier:\n{fields}\n"


def group(
    weights: str, inputs: str | None = None, form: str | None = "pack-quantized"
) -> tuple[str, ...]:
    """Lines of a stage with one config group."""
    lines = ["ignore: [lm_head]", "config_groups:", "  group_0:"]
    lines += ["    targets: [Linear]"]
    lines += [f"    weights: {{{weights}}}"]
    lines += [f"    input_activations: {{{inputs}}}"] if inputs else []
    lines += [f"    format: {form}"] if form else []
    return tuple(lines)


INT4 = "num_bits: 4, type: int, strategy: group, group_size: 128, symmetric: true"
INT8 = "num_bits: 8, type: int, strategy: token, dynamic: true, symmetric: true"
FP8 = "num_bits: 8, type: float, strategy: token, dynamic: true, symmetric: true"

QWEN3 = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 512,
}
MOE = QWEN3 | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}

FAQ = "faq_stage:\n  faq_modifiers:\n    FAQModifier: {}\n"

GPTQ_MLP = """    GPTQModifier:
      targets: ["re:.*mlp.*"]
      scheme: W4A16
      actorder: weight
"""

CASES = [
    # files and text
    Case("no such file", "no-file", path="recipes/faq_slider_w4a8.yml"),
    Case("no such file, and nothing like it", "no-file", path="recipes/zzz.yaml"),
    Case("no such folder", "no-file", path="nowhere/recipe.yaml"),
    Case("a folder", "no-file", path="recipes"),
    Case("a file that is no text", "unreadable", path=f"{SMALL}/model.safetensors"),
    Case("not YAML", "not-yaml", "quant_stage: [1, 2"),
    Case("tabs for indentation", "not-yaml", "quant_stage:\n\tquant_modifiers: {}\n"),
    Case("a Python object", "not-yaml", "quant_stage: !!python/tuple [1, 2]\n"),
    Case("empty", "empty", "# nothing yet\n"),
    Case("a list", "not-a-mapping", "- SliderQuantModifier:\n    scheme: W4A16\n"),
    Case("a key twice", "repeated-key", slider("scheme: W4A16", "scheme: W8A8")),
    # nesting
    Case("no modifier", "no-modifier", "{}\n"),
    Case(
        "a misspelt stage", "stage-key", slider("scheme: W4A16").replace("ge", "g", 1)
    ),
    Case(
        "a stage that a merged recipe.yaml holds",
        "stage-key",
        slider("scheme: W4A16").replace("quant_stage", "quant_stage_0"),
    ),
    Case("modifiers at the top", "stage-key", "modifiers:\n  - SliderQuantModifier\n"),
    Case("stages as a list", "stage-key", "stages: [{quant: {}}]\n"),
    Case("a bare modifier", "stage-key", "SliderQuantModifier: {scheme: W4A16}\n"),
    Case("a key that is a number", "key-type", "1:\n  quant_modifiers: {}\n"),
    Case("an empty stage", "empty-stage", "quant_stage:\n"),
    Case("a stage that is a list", "empty-stage", "quant_stage: [1]\n"),
    Case(
        "a misspelt group",
        "group-key",
        slider("scheme: W4A16").replace("quant_modifiers", "quant_modifier"),
    ),
    Case(
        "a group called modifiers",
        "group-key",
        slider("scheme: W4A16").replace("quant_modifiers", "modifiers"),
    ),
    Case(
        "a modifier without a group",
        "group-key",
        "quant_stage:\n  SliderQuantModifier: {scheme: W4A16}\n",
    ),
    Case("an empty group", "empty-group", "quant_stage:\n  quant_modifiers: {}\n"),
    Case(
        "a group that is a list",
        "empty-group",
        "quant_stage:\n  quant_modifiers: [SliderQuantModifier]\n",
    ),
    Case(
        "null arguments",
        "null-arguments",
        "faq_stage:\n  faq_modifiers:\n    FAQModifier:\n",
    ),
    Case(
        "arguments that are text",
        "arguments-type",
        "quant_stage:\n  quant_modifiers:\n    SliderQuantModifier: W4A16\n",
    ),
    Case(
        "a key without effect",
        "ignored-key",
        slider("scheme: W4A16", "ignore: [lm_head]") + "version: 3\n",
        severity="warning",
    ),
    # names, fields and values
    Case(
        "an unknown modifier",
        "unknown-modifier",
        slider("scheme: W4A16").replace("SliderQuant", "SliderQant"),
    ),
    Case("the field group", "group-argument", slider("scheme: W4A16", "group: q")),
    Case("an unknown field", "unknown-field", slider("scheme: W4A16", "epoch: 3")),
    Case(
        "an unknown field of a config group",
        "unknown-field",
        slider(*group(INT4.replace("num_bits", "num_bit"))),
    ),
    Case("an unknown scheme", "unknown-scheme", slider("scheme: W4A15")),
    Case("a wrong type", "wrong-type", slider("scheme: W4A16", "epochs: a few")),
    Case(
        "a wrong type of two that may be",
        "wrong-type",
        slider("scheme: W4A16", "targets: 5"),
    ),
    Case("a fraction", "wrong-type", slider("scheme: W4A16", "epochs: 2.5")),
    Case("out of range", "out-of-range", slider("scheme: W4A16", "epochs: 0")),
    Case("above the range", "out-of-range", slider("scheme: W4A16", "ratio: 1.5")),
    Case(
        "more stages than epochs",
        "value",
        slider("scheme: W4A16", "ratio: 0.5", "epochs: 1"),
    ),
    Case(
        "an unknown choice",
        "unknown-value",
        slider("scheme: W4A16", "preset: finest"),
    ),
    Case(
        "an unknown strategy",
        "unknown-value",
        slider(*group(INT4.replace("strategy: group", "strategy: row"))),
    ),
    Case(
        "a group size that is text",
        "wrong-type",
        slider(*group(INT4.replace("128", "big"))),
    ),
    Case(
        "activation order by group",
        "value",
        slider(*group(f"{INT4}, actorder: group")),
    ),
    Case(
        "a config group without targets",
        "missing-field",
        slider("config_groups:", "  group_0:", "    weights: {num_bits: 4}"),
    ),
    # stages by themselves
    Case("no number format", "slider", slider("epochs: 3")),
    Case(
        "no number format for a built-in stage",
        "no-number-format",
        "quant_stage:\n  quant_modifiers:\n    QuantizationModifier: {}\n",
    ),
    Case(
        "windows that leave layers out",
        "slider",
        slider("scheme: W4A16", "window_stride: 3"),
    ),
    Case("FP8 weights", "slider", slider("scheme: FP8_DYNAMIC")),
    Case(
        "static inputs",
        "slider",
        slider(*group("num_bits: 8, strategy: channel", "num_bits: 8", None)),
    ),
    Case(
        "an unknown target of a stage",
        "slider",
        slider("scheme: W4A16", "target: h100"),
    ),
    Case(
        "a stage's target that does not serve it",
        "not-served",
        slider("scheme: W4AFP8", "target: sm80"),
    ),
    Case(
        "a generator that is no folder",
        "no-generator",
        "faq_stage:\n  faq_modifiers:\n    FAQModifier: {generator: ./larger}\n"
        + slider("scheme: W4A16"),
    ),
    Case(
        "seeds that do not exist",
        "no-seeds",
        "faq_stage:\n  faq_modifiers:\n    FAQModifier: {seeds: prompts.jsonl}\n"
        + slider("scheme: W4A16"),
    ),
    Case(
        "a choice among one",
        "value",
        "faq_stage:\n  faq_modifiers:\n    FAQModifier: {selector: random}\n"
        + slider("scheme: W4A16"),
    ),
    Case(
        "a selector that was removed",
        "removed",
        "faq_stage:\n  faq_modifiers:\n    FAQModifier: {selector: longest}\n"
        + slider("scheme: W4A16"),
    ),
    Case(
        "a field that was removed",
        "removed",
        slider("scheme: W4A16", "stage_order: window"),
    ),
    # stages together
    Case(
        "two stages on the same layers",
        "overlap",
        slider("scheme: W4A16") + "    GPTQModifier: {scheme: W4A16}\n",
    ),
    Case(
        "complementary ignore lists",
        "complementary-ignore",
        slider("scheme: W4A16", 'ignore: [lm_head, "re:.*mlp.*"]')
        + '    GPTQModifier: {scheme: W8A16, ignore: [lm_head, "re:.*attn.*"]}\n',
    ),
    Case(
        "SmoothQuant after quantisation",
        "smoothing-late",
        slider("scheme: W4A16") + "    SmoothQuantModifier: {}\n",
    ),
    Case(
        "AWQ without a stage that quantises",
        "upstream-order",
        "awq_stage:\n  awq_modifiers:\n    AWQModifier: {}\n",
    ),
    Case(
        "FAQ last",
        "faq-unused",
        slider("scheme: W4A16") + "    FAQModifier: {}\n",
        severity="warning",
    ),
    Case(
        "FAQ after a stage that calibrates",
        "faq-late",
        slider("scheme: W4A16", 'targets: ["re:.*attn.*"]')
        + "    FAQModifier: {}\n"
        + GPTQ_MLP,
        severity="warning",
    ),
    Case(
        "one modifier twice in groups of one name",
        "same-group",
        slider("scheme: W4A16", 'targets: ["re:.*attn.*"]')
        + slider("scheme: W8A16", 'targets: ["re:.*mlp.*"]').replace("quant", "mlp", 1),
        severity="warning",
    ),
    # serving
    Case(
        "W4AFP8 as int-quantized",
        "not-served",
        slider(*group(INT4, FP8, "int-quantized")),
        target="sm90",
    ),
    Case("W4AFP8 on an A100", "not-served", slider(*group(INT4, FP8)), target="sm80"),
    Case(
        "W4AFP8 in groups of 64",
        "not-served",
        slider(*group(INT4.replace("128", "64"), FP8)),
        target="sm90",
    ),
    Case(
        "W4A8 in the CPU's form on a GPU",
        "not-served",
        slider(*group(INT4, INT8, "int-quantized")),
        target="sm90",
    ),
    Case("int3 on a CPU", "not-served", slider("scheme: W3A16"), target="cpu-avx512"),
    Case(
        "packed int4 on a CPU with AVX2 alone",
        "not-served",
        slider(*group(INT4, INT8)),
        target="cpu-avx2",
    ),
    Case(
        "groups that the CPU's W4A8 kernel does not take",
        "not-served",
        slider(*group(INT4.replace("128", "16"), INT8, "int-quantized")),
        target="cpu-avx2",
    ),
    Case(
        "a format that no target serves",
        "not-served",
        slider(*group(INT4.replace("true", "false"), INT8, "int-quantized")),
    ),
    Case(
        "W4A8 on Hopper",
        "otherwise",
        slider(*group(INT4, INT8)),
        target="sm90",
        severity="warning",
    ),
    Case(
        "W4A8 on Ampere",
        "otherwise",
        slider(*group(INT4, INT8)),
        target="sm80",
        severity="warning",
    ),
    Case(
        "W4A16 on a CPU with AMX",
        "otherwise",
        slider("scheme: W4A16"),
        target="cpu-amx",
        severity="warning",
    ),
    Case(
        "W4A4 on an A100",
        "otherwise",
        slider("scheme: W4A4"),
        target="sm80",
        severity="warning",
    ),
    Case(
        "W8A8 on Blackwell",
        "needs-flag",
        slider("scheme: W8A8"),
        target="sm100",
        severity="warning",
    ),
    Case(
        "W4AFP8, no target asked",
        "not-served-somewhere",
        slider(*group(INT4, FP8)),
        severity="warning",
    ),
    Case(
        "NVFP4",
        "not-in-table",
        slider("scheme: NVFP4A16").replace("SliderQuant", "Quantization"),
        target="sm100",
        severity="warning",
    ),
    Case(
        "a rotation that vLLM computes, on a CPU",
        "rotation",
        "spin_stage:\n  spin_modifiers:\n    SpinQuantModifier: {rotations: [R1, R4]}\n"
        + slider("scheme: W4A16"),
        target="cpu-avx512",
    ),
    Case(
        "QuIP",
        "rotation",
        "spin_stage:\n  spin_modifiers:\n    QuIPModifier: {}\n"
        + slider("scheme: W4A16"),
        severity="warning",
    ),
    Case(
        "a KV cache in int8",
        "kv-cache",
        "quant_stage:\n  quant_modifiers:\n    QuantizationModifier:\n"
        "      scheme: W8A8\n"
        "      kv_cache_scheme: {num_bits: 8, type: int, strategy: tensor}\n",
    ),
    # with a model
    Case("no such model folder", "model", slider("scheme: W4A16"), model="./nowhere"),
    Case(
        "a folder without a model", "model", slider("scheme: W4A16"), model="./recipes"
    ),
    Case(
        "targets that match nothing",
        "targets",
        slider("scheme: W4A16", 'targets: ["re:.*dwon_proj"]'),
        model=SMALL,
    ),
    Case(
        "a pattern that is no regular expression",
        "pattern",
        slider("scheme: W4A16", 'targets: ["re:["]'),
    ),
    Case("lm_head targeted", "targets", slider("scheme: W4A16"), model=SMALL),
    Case(
        "groups that do not divide",
        "group-size",
        slider(*group(INT4.replace("128", "256"))),
        model=SMALL,
    ),
    Case(
        "q, k, v in two formats",
        "fused",
        slider("scheme: W4A16", 'targets: ["re:.*q_proj", "re:.*mlp.*"]'),
        model=SMALL,
    ),
    Case(
        "gate ignored, up not",
        "fused",
        slider("scheme: W4A16", 'ignore: [lm_head, "re:.*gate_proj"]'),
        model=SMALL,
    ),
    Case(
        "the gate of a shared expert",
        "unquantized",
        slider(*group(INT4)),
        model="./model",
        config=MOE
        | {
            "model_type": "qwen2_moe",
            "architectures": ["Qwen2MoeForCausalLM"],
            "shared_expert_intermediate_size": 256,
        },
    ),
    Case(
        "two stages whose patterns overlap",
        "overlap",
        slider("scheme: W4A16", 'targets: ["re:.*proj"]') + GPTQ_MLP,
        model=SMALL,
    ),
    Case(
        "sizes that CUTLASS does not take",
        "otherwise",
        slider(*group(INT4, FP8)),
        model="./model",
        config=QWEN3 | {"num_attention_heads": 4, "head_dim": 32},
        target="sm90",
        severity="warning",
    ),
    Case(
        "sizes that no CPU kernel takes",
        "not-served",
        slider(*group("num_bits: 4, strategy: channel")),
        model="./model",
        config=QWEN3 | {"hidden_size": 144, "head_dim": 72},
        target="cpu-avx512",
    ),
    Case(
        "W4A8 experts",
        "not-served",
        slider(*group(INT4, INT8)).replace("ignore: [", "ignore: ['re:.*gate$', "),
        model="./model",
        config=MOE,
        target="sm90",
    ),
    Case(
        "experts on a CPU",
        "not-served",
        slider("scheme: W4A16", 'ignore: [lm_head, "re:.*gate$"]'),
        model="./model",
        config=MOE,
        target="cpu-avx512",
    ),
    Case(
        "a model that is quantised already",
        "model",
        slider("scheme: W4A16", "ignore: [lm_head]"),
        model="./model",
        config=QWEN3 | {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    ),
    Case(
        "a model that is no causal language model",
        "model",
        slider("scheme: W4A16", "ignore: [lm_head]"),
        model="./model",
        config={"model_type": "vit"},
    ),
    Case(
        "FAQ for a model without tokenizer",
        "no-tokenizer",
        FAQ + slider("scheme: W4A16", "ignore: [lm_head]"),
        model="./model",
        config=QWEN3,
    ),
    Case(
        "FAQ for a model without chat template",
        "no-chat-template",
        FAQ + slider("scheme: W4A16", "ignore: [lm_head]"),
        model="./model",
        config=QWEN3,
        tokenizer=True,
        severity="warning",
    ),
]


def findings_of(case: Case, folder: Path) -> list:
    """What ``check`` finds; relative paths are those of the repository."""
    from llmc_faq_slider.report.check_report import check_recipe

    path = Path(case.path or folder / "recipe.yaml")
    if case.path is None:
        path.write_text(case.recipe)
    if case.config is not None:
        _write_model(folder / "model", case)
    before = os.getcwd()
    os.chdir(ROOT if case.config is None else folder)
    try:
        return check_recipe(path, case.model, case.target)[0]
    finally:
        os.chdir(before)


def _write_model(folder: Path, case: Case) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(case.config))
    if case.tokenizer:
        small = ROOT / SMALL
        shutil.copy(small / "tokenizer.json", folder)
        settings = json.loads((small / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def table(find: Callable[[Case], list]) -> str:
    """The document: a heading per input, the input, and the sentence."""
    parts = [
        "# Bad inputs and what the user sees\n",
        "Made by `python tests/unit/bad_recipes.py`; a test keeps it up to date.\n",
    ]
    for case in CASES:
        finding = next(f for f in find(case) if f.code == case.code)
        options = [f"--model {case.model}"] if case.model else []
        options += [f"--target {case.target}"] if case.target else []
        shown = case.path or f"```yaml\n{case.recipe.rstrip()}\n```"
        if case.config is not None:
            shown += f"\n\n`model/config.json`: `{json.dumps(case.config)}`"
        parts.append(
            f"## {case.title[0].upper()}{case.title[1:]}\n\n"
            f"{shown}\n"
            + (f"\n`{' '.join(options)}`\n" if options else "")
            + f"\n> {finding.severity}: {finding.message}\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    import tempfile

    from bad_arguments import section, sentence_of

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipes = table(lambda case: findings_of(case, folder))
        calls = section(lambda a: sentence_of(a, folder / a.title))
    TABLE.write_text(f"{recipes}\n{calls}")
