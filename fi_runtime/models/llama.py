"""Llama 2 and 3 (Touvron et al., 2023): what the other families are told apart from."""

from fi_runtime.models.family import Family

LLAMA = Family()
