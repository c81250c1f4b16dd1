"""The language model: loading, the LM head, and tokenization."""
