"""``llmc-faq-slider check``: a recipe's findings and what vLLM makes of it, shown."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmc_faq_slider.host.declared import declared_groups
from llmc_faq_slider.host.findings import Finding, errors
from llmc_faq_slider.host.model_check import check_model, model_servings
from llmc_faq_slider.host.other_formats import other_findings
from llmc_faq_slider.host.recipe_lint import lint_modifiers, lint_recipe
from llmc_faq_slider.host.serving_check import Served, serving_findings, servings
from llmc_faq_slider.host.skeleton import load_skeleton
from llmc_faq_slider.report.serving import describe, find_target, known_targets

__all__ = ["check_recipe", "print_check"]

STYLES = {
    "as declared": "green",
    "otherwise": "yellow",
    "needs a flag": "yellow",
    "not served": "red",
    "not in the table": "dim",
}


def check_recipe(
    recipe: Path, model: str | None = None, target: str | None = None
) -> tuple[list[Finding], list[Served]]:
    """
    Everything that can be said of a recipe without running it.

    :param model: folder or hub id; its config.json gives names and sizes of layers
    :param target: hardware that has to serve the checkpoint, None for any
    :raises ValueError: if ``target`` is not known
    """
    asked = None if target is None else find_target(target)
    targets = known_targets() if asked is None else [asked]
    modifiers, findings = lint_recipe(recipe)
    served = list(servings(declared_groups(modifiers), targets))
    if model is not None:
        try:
            skeleton = load_skeleton(model)
        except ValueError as error:
            findings.append(Finding("error", "model", model, str(error)))
        else:
            findings += check_model(modifiers, skeleton, model)
            findings += lint_modifiers(modifiers, skeleton)
            served = list(model_servings(modifiers, skeleton, targets))
    findings += serving_findings(served, asked)
    findings += other_findings(modifiers, asked)
    return list(dict.fromkeys(findings)), served


def print_check(
    findings: list[Finding], served: list[Served], as_json: bool, console: Console
) -> None:
    """The result as a table and sentences, or as JSON for machines."""
    if as_json:
        document = {
            "ok": not errors(findings),
            "findings": [asdict(finding) for finding in findings],
            "groups": [_plain(one) for one in served],
        }
        console.print_json(json.dumps(document))
        return
    for group in _grouped(served):
        declared = group[0].declared
        console.print(Text(f"{declared.label}: {describe(declared.group)}", "bold"))
        console.print(_table(group))
    for finding in findings:
        style = "red" if finding.severity == "error" else "yellow"
        console.print(Text(f"{finding.severity}: ", style), finding.message, sep="")
    if not findings:
        console.print("Nothing found that stands in the way.")


def _plain(one: Served) -> dict[str, Any]:
    serving = asdict(one.serving)
    return {
        "group": one.declared.label,
        "declared": describe(one.declared.group),
        "layers": [asdict(layer) for layer in one.layers],
        **serving,
        "target": serving["target"]["name"],
    }


def _grouped(served: list[Served]) -> list[list[Served]]:
    groups: dict[int, list[Served]] = {}
    for one in served:
        groups.setdefault(id(one.declared), []).append(one)
    return list(groups.values())


def _table(group: list[Served]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("target", "scheme", "kernel", "inputs", "from vLLM", "result"):
        table.add_column(column)
    outcomes = Counter(one.serving.target for one in group)
    for one in group:
        serving = one.serving
        several = outcomes[serving.target] > 1
        layers = ", ".join(layer.name for layer in one.layers) if several else ""
        flag = f"; {serving.flag}" if serving.flag else ""
        table.add_row(
            f"{serving.target.name} ({serving.target.hardware})",
            (serving.scheme or "none").removeprefix("CompressedTensors"),
            (serving.kernel or "none").removesuffix("LinearKernel")
            + (f" ({layers})" if layers else ""),
            serving.computes or "-",
            serving.since if serving.since and serving.served else "-",
            Text(serving.verdict + flag, STYLES[serving.verdict]),
        )
    return table
