"""The front end: what runs inside Triton's Python backend. Imports no torch.

``requests`` turns tensors into prompts and parameters, ``text`` tokens into text, ``replies``
both into tensors; ``engine_link`` starts and reaches an engine, ``supervisor`` gets another one
when it dies; ``triton`` is the model class.
"""
