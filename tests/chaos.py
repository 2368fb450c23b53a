"""Kills runs at random moments and compares what they end with, bit for bit.

``make chaos`` runs it with 50 kills. One interpreter imports everything and forks a
process per run, so that a kill costs no start-up. Every trial has a folder of its own:
a run is killed with SIGKILL after a random time, then the same run is started again and
left alone. Its safetensors must equal those of a run that nobody disturbed. With
``--signal TERM`` or ``INT`` runs are asked to stop instead.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# Weights are read by threads otherwise, and torch's pools do not survive a fork.
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parent / "integration"))

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from family import TESTS, held_out_rows, load, quantize  # noqa: E402
from loguru import logger  # noqa: E402

from llmc_faq_slider import FAQModifier, SliderQuantModifier  # noqa: E402

MODEL = TESTS / "models" / "small"
# Six windows, and three epochs of the closing pass.
FIELDS = {
    "ignore": ["lm_head"],
    "scheme": "W8A8",
    "shallow_layers": 2,
    "deep_layers": 2,
    "window_size": 2,
    "window_stride": 2,
    "epochs": 2,
    "closing_epochs": 3,
    "batch_size": 2,
}
VARIANTS = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16, two stages": (torch.bfloat16, {"ratio": 0.5}),
    "bfloat16, FAQ before it": (torch.bfloat16, {"loss_on_responses": True}),
}
# Gates that the tiny family's babble passes.
FAQ = {
    "generator": "self",
    "num_candidates": 2,
    "num_samples": 4,
    "sequence_length": 32,
    "max_new_tokens": 8,
    "batch_size": 4,
    "min_response_tokens": 1,
    "max_repeated_share": 1.0,
    "max_zlib_ratio": 1000.0,
    "max_fallback_fraction": 1.0,
}


def run(variant: str, state: Path | None, output: Path, rows: Dataset) -> None:
    """One ``oneshot``, with its state in a folder or without any."""
    dtype, changes = VARIANTS[variant]
    folder = None if state is None else str(state)
    stages = [SliderQuantModifier(**FIELDS | changes, checkpoint_dir=folder)]
    data = {"dataset": rows}
    if "FAQ" in variant:
        cache = str(state or output) + " FAQ"
        stages, data = [FAQModifier(**FAQ, cache_dir=cache), *stages], {}
    quantize(load(MODEL, dtype), stages, output_dir=str(output), **data)


STOPPED = 100


def fork(work: Callable[[], None]) -> int:
    """Process id of a child that does the work and ends."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        logger.remove()
        work()
        status = 0
    except (KeyboardInterrupt, SystemExit):
        status = STOPPED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def finished(child: int) -> bool:
    """Wait for a child; whether it came to its own good end."""
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == STOPPED:
        return False
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError("a run failed; see above")
    return True


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.safetensors"))
    }


def where(state: Path) -> str:
    """How far a run was when it ended."""
    records = sorted(state.rglob("state-*.json"))
    if not records:
        return "before the first state"
    progress = json.loads(records[-1].read_text())["progress"]
    place = f"{progress['windows']} windows"
    if "window" in progress:
        place += f" and {progress['window']['step']} steps"
    if "closing" in progress:
        place += f" and {progress['closing']['step']} closing steps"
    return place


def chaos(kills: int, seed: int, number: signal.Signals, root: Path) -> None:
    """
    :param number: signal that ends the runs
    :raises AssertionError: if a run that was ended ends with other bytes
    """
    torch.set_num_threads(1)
    # In the background it would be ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    moments = random.Random(seed)
    data = held_out_rows(MODEL, half=0)[:4, :32].tolist()
    rows = Dataset.from_dict(
        {"input_ids": data, "attention_mask": [[1] * 32 for _ in data]}
    )
    expected, seconds = {}, {}
    for variant in list(VARIANTS)[:kills]:
        began = time.monotonic()
        output = root / f"undisturbed {variant}"
        assert finished(fork(lambda v=variant, o=output: run(v, None, o, rows)))
        seconds[variant] = time.monotonic() - began
        expected[variant] = hashes(output)
        assert expected[variant], "nothing was saved"
        print(f"{variant}: {seconds[variant]:.1f} s undisturbed", flush=True)
    for kill in range(kills):
        variant = list(VARIANTS)[kill % len(VARIANTS)]
        state, output = root / f"state {kill}", root / f"output {kill}"
        ended = False
        while not ended:
            child = fork(lambda v=variant, s=state, o=output: run(v, s, o, rows))
            time.sleep(moments.uniform(0, seconds[variant]))
            os.kill(child, number)
            ended = not finished(child)
            place = where(state)
            if not ended:
                shutil.rmtree(state)
        assert finished(fork(lambda v=variant, s=state, o=output: run(v, s, o, rows)))
        assert hashes(output) == expected[variant], (variant, kill, place)
        print(f"{kill + 1} ({variant}): ended after {place}, identical", flush=True)
    print(f"{kills} identical")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", default="KILL", choices=["KILL", "TERM", "INT"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        number = signal.Signals[f"SIG{given.signal}"]
        chaos(given.kills, given.seed, number, Path(folder))
