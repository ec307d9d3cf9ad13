"""Attention over the paged cache: one interface, one module for each way to compute it."""
