"""Optional dependencies: which extra installs a package, and the error where it is missing."""

from embrm.core.errors import UserError

_EXTRAS = {
    **dict.fromkeys(["transformers", "tokenizers", "datasets", "huggingface_hub"], "extract"),
    **dict.fromkeys(["accelerate", "peft", "trl"], "finetune"),
    "vllm": "vllm",
}
"""Package → the extra of pyproject.toml that installs it."""


def missing_extra(error: ModuleNotFoundError) -> UserError | None:
    """The error for an import that failed because an extra is not installed, else None."""
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRAS:
        return None
    return UserError(
        f"this needs {package}, which is not installed: from a clone of embrm run "
        f"pip install -c constraints.txt '.[{_EXTRAS[package]}]'"
    )
