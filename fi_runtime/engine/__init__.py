"""The engine: one process that owns the device and turns prompts into tokens.

``scheduler`` says what a step computes, ``runner`` computes it, ``sampler`` chooses tokens,
``core`` is the three together and ``server`` gives them to front ends.
"""
