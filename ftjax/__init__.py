"""ftjax fine-tunes Hugging Face language models in JAX."""

__version__ = "0.1.0"
