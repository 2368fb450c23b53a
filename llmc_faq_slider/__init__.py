"""FAQ and SliderQuant as recipe stages of llm-compressor; importing registers them."""

from llmc_faq_slider.host.quiet import quiet_import

with quiet_import():
    from llmc_faq_slider.faq.modifier import FAQModifier
    from llmc_faq_slider.host.oneshot import oneshot
    from llmc_faq_slider.host.registration import register_stage
    from llmc_faq_slider.slider.modifier import SliderQuantModifier

__all__ = ["FAQModifier", "SliderQuantModifier", "oneshot"]
__version__ = "0.1.0"

register_stage(FAQModifier)
register_stage(SliderQuantModifier)
