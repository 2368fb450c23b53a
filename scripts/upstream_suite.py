"""llm-compressor's own tests of the installed release, without and with our package.

The tests come from the release's source archive on PyPI. Each part runs twice; only a
test that fails with ``llmc_faq_slider`` imported and passes without it counts. What
needs a GPU skips itself; what needs a model hub fails both times and is listed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path

CACHE = Path(".cache/upstream")
PARTS = ("recipe", "core", "pipelines", "modifiers")
# What their tests import and neither environment has.
HELPERS = ("pytest-mock", "parameterized")

Outcomes = dict[str, tuple[str, str]]


def fetch(release: str) -> Path:
    """Folder of the release's tests, downloaded once."""
    folder = CACHE / f"llmcompressor-{release}"
    if (folder / "tests").is_dir():
        return folder
    pip = [sys.executable, "-m", "pip", "--quiet"]
    CACHE.mkdir(parents=True, exist_ok=True)
    download = ["download", "--no-deps", "--no-binary", "llmcompressor"]
    subprocess.run(
        [*pip, *download, "--dest", str(CACHE), f"llmcompressor=={release}"], check=True
    )
    archive = CACHE / f"llmcompressor-{release}.tar.gz"
    with tarfile.open(archive) as content:
        # Without src/, so that the installed package is what is tested.
        members = [
            member
            for member in content.getmembers()
            if member.name.split("/")[1:2] in (["tests"], ["pyproject.toml"])
        ]
        content.extractall(CACHE, members, filter="data")
    return folder


def helpers() -> Path:
    """Folder with the pytest plugins that their tests ask for."""
    folder = CACHE / "helpers"
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps"]
        subprocess.run([*command, "--target", str(folder), *HELPERS], check=True)
    return folder


def run(folder: Path, parts: list[str], ours: bool, extra: Path) -> Outcomes:
    """Outcome and reason of every test, by its name."""
    report = (CACHE / ("with.xml" if ours else "without.xml")).absolute()
    report.unlink(missing_ok=True)
    paths = [str(extra.absolute()), str(Path.cwd()), os.environ.get("PYTHONPATH", "")]
    plugins = ["-p", "pytest_mock", "-p", "no:cacheprovider"]
    plugins += ["-p", "llmc_faq_slider"] if ours else []
    with (CACHE / f"{report.stem}.log").open("wb") as log:
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--tb=line", *plugins]
            + [f"--junitxml={report}", "--continue-on-collection-errors"]
            + [f"tests/llmcompressor/{part}" for part in parts],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
                "TQDM_DISABLE": "1",
            },
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if not report.is_file():
        raise SystemExit(f"pytest wrote no report; see {CACHE / report.stem}.log")
    return {
        f"{case.get('classname')}::{case.get('name')}": outcome(case)
        for case in ElementTree.parse(report).iter("testcase")
    }


def outcome(case: ElementTree.Element) -> tuple[str, str]:
    for kind in ("failure", "error", "skipped"):
        found = case.find(kind)
        if found is not None:
            message = found.get("message") or ""
            if not message or message == "collection failure":
                lines = (found.text or message).strip().splitlines()
                message = next(
                    (line for line in reversed(lines) if line.startswith("E ")),
                    lines[-1] if lines else "",
                ).removeprefix("E ")
            return kind, " ".join(message.split())[:100]
    return "passed", ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help="of tests/")
    parts = parser.parse_args().parts
    release = version("llmcompressor")
    folder, extra = fetch(release), helpers()
    plain = run(folder, parts, False, extra)
    ours = run(folder, parts, True, extra)
    for title, outcomes in (("without", plain), ("with", ours)):
        counts = Counter(kind for kind, _ in outcomes.values())
        shown = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
        print(f"llmcompressor {release}, {title} llmc_faq_slider: {shown}")
    print("\nnot passed in either, and why:")
    reasons = Counter(
        f"{kind}: {why}"
        for name, (kind, why) in plain.items()
        if kind != "passed" and ours.get(name, ("", ""))[0] != "passed"
    )
    for reason, number in reasons.most_common():
        print(f"  {number:4d}  {reason}")
    spoilt = [
        (name, kind, why)
        for name, (kind, why) in ours.items()
        if kind in ("failure", "error") and plain.get(name, ("", ""))[0] == "passed"
    ]
    lost = [name for name in plain if name not in ours]
    for name, kind, why in spoilt:
        print(f"\nfails with our package only: {name}: {kind}: {why}")
    for name in lost:
        print(f"\nnot found with our package: {name}")
    if "passed" not in {kind for kind, _ in ours.values()}:
        raise SystemExit("no test passed, so nothing was compared")
    if spoilt or lost:
        raise SystemExit(1)
    print("\nNo test fails that passes without our package.")


if __name__ == "__main__":
    main()
