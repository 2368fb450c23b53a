"""Regeneration of calibration data by a larger sibling of the model's own family.

Nothing in this folder but ``modifier.py`` knows llm-compressor: the rest works on
text, token ids and ``transformers`` models and can be called by itself, starting at
:func:`llmc_faq_slider.faq.regenerate.regenerate`.

The published description of the method stops at its outline (larger sibling, several
candidates with chain of thought, competition judged by an expert, re-normalisation).
The group size, the score, the prompts, the gates and all sizes here are our choices.
"""
