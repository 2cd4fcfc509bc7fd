"""Tokenizers: loaded, and written so that others load them."""
