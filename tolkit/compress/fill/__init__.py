"""Tables filled to a size: codecs `bands` and `steps`, fitted to a source and a budget of bytes.

`bands` and `steps` begin a fit: they search the price or scale that meets the budget on a sample,
by walks through the layers (`walk`, and each codec's own), then walk all rows. `transform` is what
a layer's fit rests on, `allocate` and `step_classes` share the bits out, `resolve*` say what is
stored, `encode_steps` tries again where coded records came out too large.
"""
