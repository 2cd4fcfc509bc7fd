"""GGUF files: configuration, tensors and tokenizer in Hugging Face form."""
