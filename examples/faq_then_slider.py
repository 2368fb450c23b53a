"""A larger sibling writes the calibration data, then SliderQuant quantises on it.

    python examples/faq_then_slider.py Qwen/Qwen3-0.6B Qwen/Qwen3-8B Qwen3-0.6B-W4A8

The sibling can also be the URL of an OpenAI-compatible server, such as one that
``vllm serve Qwen/Qwen3-8B`` starts.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from llmc_faq_slider import FAQModifier, SliderQuantModifier, oneshot


def main(target: str, sibling: str, output: str) -> None:
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(target, dtype="auto"),
        tokenizer=AutoTokenizer.from_pretrained(target),
        recipe=[
            FAQModifier(generator=sibling),
            SliderQuantModifier(targets=["Linear"], ignore=["lm_head"], scheme="W4A8"),
        ],
        output_dir=output,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
