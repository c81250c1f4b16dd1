"""Adoption: builds a cache from arrays of hidden states that another program computed."""
