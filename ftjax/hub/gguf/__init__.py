"""GGUF files: configuration, tensors and tokenizer, as Hugging Face has them."""
