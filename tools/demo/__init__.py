"""The demo checkpoint: its tasks, its tokenizer, its training and its evaluation.

`python -m tools.demo.train --out DIR` generates the text, trains the model and writes a
Hugging Face checkpoint folder; `python -m tools.demo.evaluate DIR` measures one.
"""
