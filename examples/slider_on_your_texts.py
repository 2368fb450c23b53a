"""Three-bit weights from texts of your own; a run that is killed goes on.

    python examples/slider_on_your_texts.py Qwen/Qwen3-0.6B texts.jsonl Qwen3-0.6B-W3A16

``texts.jsonl`` has a field ``text`` in each line. Run the same command again after a
kill: it continues with the window that was under way.
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmc_faq_slider import oneshot

RECIPE = """
quant_stage:
  slider_modifiers:
    SliderQuantModifier:
      ignore: ["lm_head"]
      checkpoint_dir: {folder}
      config_groups:
        group_0:
          targets: ["Linear"]
          weights:
            num_bits: 3
            type: int
            symmetric: true
            strategy: group
            group_size: 128
"""


def main(target: str, texts: str, output: str) -> None:
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(target, dtype="auto"),
        tokenizer=AutoTokenizer.from_pretrained(target),
        dataset=load_dataset("json", data_files=texts, split="train"),
        recipe=RECIPE.format(folder=f"{output}-state"),
        num_calibration_samples=512,
        max_seq_length=2048,
        output_dir=output,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
