"""SliderQuant: learned quantisation in windows that slide over the decoder layers."""
