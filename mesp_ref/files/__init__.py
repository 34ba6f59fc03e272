"""What strangers wrote and what we write: checkpoints, adapters, tokenizers, 4-bit, GGUF."""
