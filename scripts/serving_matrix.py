"""Writes the table of what vLLM serves into README.md, from the package's own table."""

from __future__ import annotations

from pathlib import Path

from llmc_faq_slider.host.declared import declared_groups
from llmc_faq_slider.host.recipe_lint import lint_recipe
from llmc_faq_slider.report.serving import Serving, find_target, serve

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
START, END = "<!-- serving table -->\n", "<!-- end of serving table -->\n"

#: recipes that show each format once
RECIPES = (
    "slider_w4a16",
    "slider_w4a16_asym",
    "faq_slider_w4a8",
    "faq_slider_w4a8_cpu",
    "faq_slider_w4afp8",
    "slider_w8a8",
    "slider_w4a4",
    "slider_w3a16",
    "slider_w2a16",
)
#: columns: targets that are the same in every row
COLUMNS = {
    "CPU with AVX2": ("cpu-avx2",),
    "CPU with AVX-512": ("cpu-avx512",),
    "CPU with AMX": ("cpu-amx",),
    "A100, L40S": ("sm80", "sm89"),
    "H100, H200": ("sm90",),
    "B200, RTX 50": ("sm100", "sm120"),
}


def matrix() -> str:
    """One row per recipe, one column per kind of hardware, as markdown."""
    lines = [
        f"| recipe | {' | '.join(COLUMNS)} |",
        f"| --- | {' | '.join('---' for _ in COLUMNS)} |",
    ]
    for recipe in RECIPES:
        modifiers, _ = lint_recipe(ROOT / "recipes" / f"{recipe}.yaml")
        (declared,) = declared_groups(modifiers)
        cells = []
        for targets in COLUMNS.values():
            servings = [serve(declared.group, find_target(t)) for t in targets]
            texts = {_cell(serving) for serving in servings}
            assert len(texts) == 1, (recipe, targets, texts)
            cells.append(texts.pop())
        lines.append(f"| `{recipe}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(serving: Serving) -> str:
    if serving.verdict == "needs a flag":
        return f"`{serving.flag}`"
    if serving.kernel is None or serving.computes is None:
        return "none"
    kernel = serving.kernel.removesuffix("LinearKernel").removesuffix("ScaledMM")
    mark = "" if serving.verdict == "as declared" else " *"
    return f"{kernel}: {serving.computes.split(' per ')[0]}{mark}"


def updated(readme: str) -> str:
    """README's text with the table as it is now."""
    before, rest = readme.split(START)
    _, after = rest.split(END)
    return f"{before}{START}{matrix()}{END}{after}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text("utf-8")), "utf-8")
