"""embrm: pay for the language model once, then ask it hundreds of questions."""

__version__ = "0.4.0"
