"""Tokenizers: loading, and writing them so that other tools can load them."""
