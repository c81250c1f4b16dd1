"""Extraction: runs a causal LM over preference data and caches its hidden states."""
