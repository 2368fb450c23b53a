"""SliderQuant where it pays most, GPTQ for the rest, in one recipe.

    python examples/slider_beside_gptq.py Qwen/Qwen3-0.6B calibration Qwen3-0.6B-W4A16

``calibration`` is a folder that ``llmc-faq-slider regenerate`` wrote. SliderQuant
learns attention and the inputs of the MLP, GPTQ takes the down projections.
"""

import sys

from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmc_faq_slider import SliderQuantModifier, oneshot

DOWN = r"re:.*down_proj"


def main(target: str, calibration: str, output: str) -> None:
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(target, dtype="auto"),
        tokenizer=AutoTokenizer.from_pretrained(target),
        dataset=calibration,
        recipe=[
            SliderQuantModifier(
                targets=["Linear"],
                ignore=["lm_head", r"re:.*down_proj"],
                scheme="W4A16",
            ),
            GPTQModifier(targets=[r"re:.*down_proj"], scheme="W4A16"),
        ],
        output_dir=output,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
