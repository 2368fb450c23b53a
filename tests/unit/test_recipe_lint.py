"""Bad recipes end in a sentence, good ones in silence, and nothing in a traceback."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import bad_recipes
import pytest
import yaml
from bad_arguments import ARGUMENTS, section, sentence_of
from bad_recipes import CASES, ROOT, findings_of
from generated import cases
from hypothesis import strategies as st
from llmcompressor.recipe import Recipe
from typer.testing import CliRunner

from llmc_faq_slider import SliderQuantModifier
from llmc_faq_slider.cli import app
from llmc_faq_slider.host.declared import declared_groups
from llmc_faq_slider.host.findings import errors
from llmc_faq_slider.host.recipe_lint import lint_recipe
from llmc_faq_slider.host.serving_check import serving_findings, servings
from llmc_faq_slider.report.check_report import check_recipe
from llmc_faq_slider.report.serving import known_targets

pytestmark = pytest.mark.unit

FINDERS = (
    "host/checks",
    "host/model_check",
    "host/group_sizes",
    "host/other_formats",
    "host/recipe_fields",
    "host/recipe_lint",
    "host/recipe_text",
    "host/serving_check",
    "report/check_report",
)
CODES = re.compile(r'Finding\(\s*"(?:error|warning)",\s*"([\w-]+)"')
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What every bad input gives."""
    folder = tmp_path_factory.mktemp("cases")
    return {case.title: findings_of(case, folder) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=[case.title for case in CASES])
def test_bad_input_gives_its_sentence(case, found):
    matching = [f for f in found[case.title] if f.code == case.code]
    assert matching, found[case.title]
    for finding in matching:
        assert finding.severity == case.severity
        assert finding.message[-1] in ".?", finding.message
        assert "\n" not in finding.message
    if case.severity == "warning" and case.code not in ("faq-late", "same-group"):
        assert not errors(found[case.title])


def test_every_kind_of_finding_has_a_bad_input():
    package = ROOT / "llmc_faq_slider"
    text = "".join((package / f"{name}.py").read_text() for name in FINDERS)
    for case in CASES:
        assert f'"{case.code}"' in text, case.code
    written = {
        constant
        for constant in CODES.findall(text)
        if constant not in {case.code for case in CASES}
    }
    # In Python only, not from a recipe file: tested below.
    assert written <= {"recipe-type", "no-stage", "arguments"}


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> dict[str, str]:
    """What every bad argument gives."""
    folder = tmp_path_factory.mktemp("arguments")
    return {a.title: sentence_of(a, folder / a.title) for a in ARGUMENTS}


@pytest.mark.parametrize("title", [argument.title for argument in ARGUMENTS])
def test_bad_argument_gives_a_sentence(title, sentences):
    sentence = sentences[title]
    assert sentence[-1] in ".?" and "\n" not in sentence
    assert 20 < len(sentence) < 400 and "Traceback" not in sentence


def test_list_of_bad_inputs_is_up_to_date(found, sentences):
    recipes = bad_recipes.table(lambda case: found[case.title])
    calls = section(lambda argument: sentences[argument.title])
    assert bad_recipes.TABLE.read_text() == f"{recipes}\n{calls}", (
        "run .venv/bin/python tests/unit/bad_recipes.py"
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_own_recipes_are_clean(path):
    modifiers, findings = lint_recipe(path)
    assert modifiers and not findings
    assert not errors(check_recipe(path)[0])


def test_recipes_in_python():
    slider = SliderQuantModifier(scheme="W4A16", ignore=["lm_head"])
    assert lint_recipe(slider) == ([slider], [])
    assert lint_recipe(Recipe.from_modifiers([slider]))[1] == []
    text = RECIPES[0].read_text()
    assert len(lint_recipe(text)[0]) == 2
    for recipe, code in [
        ([], "no-modifier"),
        (["recipes/a.yaml", "recipes/b.yaml"], "recipe-type"),
        (3, "recipe-type"),
        ("slider_w4a16", "no-file"),
        ("", "empty"),
    ]:
        (finding,) = lint_recipe(recipe)[1]
        assert finding.code == code, finding


def test_stage_argument_selects_as_upstream():
    recipe = ROOT / "recipes" / "faq_slider_w4a8.yaml"
    (modifier,), findings = lint_recipe(recipe, "quant")
    assert type(modifier) is SliderQuantModifier and not findings
    assert [f.code for f in lint_recipe(recipe, "qaunt")[1]] == ["no-stage"]


# What may stand anywhere in a YAML file.
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats(allow_nan=True)
    | st.text(max_size=8)
    | st.sampled_from(["self", "W4A16", "group", "Linear", "re:[", "sm90", "auto"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner)
    ),
    max_leaves=6,
)
keys = st.text(max_size=10) | st.sampled_from(
    ["num_bits", "scheme", "group", "targets", "quant_stage", "modifiers", "target"]
)


def _places(document, path=()):
    yield path
    children = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document)
        if isinstance(document, list)
        else ()
    )
    for key, value in children:
        yield from _places(value, (*path, key))


@st.composite
def mutated_documents(draw):
    """One of the package's recipes with one to three changes anywhere in it."""
    document = yaml.safe_load(draw(st.sampled_from(RECIPES)).read_text())
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(list(_places(document))[1:] or [("x",)]))
        parent = document
        for key in path:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "remove", "rename", "add", "copy"]))
        if action == "replace":
            parent[last] = draw(values)
        elif action == "remove":
            del parent[last]
        elif isinstance(parent, dict):
            value = {"rename": None, "add": draw(values), "copy": None}[action]
            value = value if action == "add" else copy.deepcopy(parent[last])
            if action == "rename":
                del parent[last]
            parent[draw(keys)] = value
        if not isinstance(document, dict) or len(list(_places(document))) < 2:
            break
    return yaml.safe_dump(document, sort_keys=False)


@st.composite
def mutated_text(draw):
    """One of the package's recipes with a piece cut out or put in."""
    text = draw(st.sampled_from(RECIPES)).read_text()
    start = draw(st.integers(0, len(text)))
    end = draw(st.integers(start, min(len(text), start + 40)))
    return text[:start] + draw(st.text(max_size=6)) + text[end:]


def _upstream_modifiers(path: Path) -> int | None:
    """How many modifiers llm-compressor makes of a file; None if it stops."""
    try:
        return len(Recipe.create_instance(str(path)).modifiers)
    except Exception:
        return None


@cases(400, text=mutated_documents() | mutated_text())
def test_no_recipe_ends_in_a_traceback(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, "utf-8", errors="surrogatepass")
    modifiers, findings = lint_recipe(path)
    served = list(servings(declared_groups(modifiers), known_targets()))
    findings += serving_findings(served, None)
    for finding in findings:
        assert finding.message.strip() and "Traceback" not in finding.message
    if not errors(findings):
        # What passes, llm-compressor takes as it is written.
        assert _upstream_modifiers(path) == len(modifiers) > 0
    if not _upstream_modifiers(path):
        assert errors(findings)


@cases(200, text=st.text(max_size=60))
def test_no_text_ends_in_a_traceback(text):
    assert errors(lint_recipe(text)[1])


def run(*arguments: str):
    return CliRunner().invoke(app, ["check", *arguments])


def test_exit_codes():
    recipes = ROOT / "recipes"
    good = str(recipes / "faq_slider_w4afp8.yaml")
    assert run(good).exit_code == 0
    hopper = run(good, "--target", "sm90")
    assert hopper.exit_code == 0
    # scheme and kernel, in vLLM's words
    assert "W4A8Fp8" in hopper.stdout and "CutlassW4A8" in hopper.stdout
    refused = run(good, "--target", "sm80")
    assert refused.exit_code == 1 and "not served on sm80" in refused.stdout
    assert run(str(recipes / "none.yaml")).exit_code == 1
    unknown = run(good, "--target", "h100")
    assert unknown.exit_code == 2 and "Did you mean" in unknown.output
    assert run().exit_code == 2


def test_json_is_for_machines(small_model):
    recipe = str(ROOT / "recipes" / "slider_w4a4.yaml")
    done = run(recipe, "--model", str(small_model), "--target", "sm90", "--json")
    document = json.loads(done.stdout)
    assert document["ok"] is True and done.exit_code == 0
    (group,) = document["groups"]
    assert group["kernel"] == "MacheteLinearKernel"
    assert group["computes"] == "16 bit" and group["verdict"] == "otherwise"
    assert {layer["name"] for layer in group["layers"]} == {
        "qkv_proj",
        "o_proj",
        "gate_up_proj",
        "down_proj",
    }
    assert [finding["code"] for finding in document["findings"]] == ["otherwise"]
