"""embrm: pay for the language model once, then train hundreds of reward heads on its states.

The names in `__all__` are the public API (docs/python.md); each is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embrm.api.caches import (
        adopt,
        extract,
        extract_shard,
        list_caches,
        merge,
        open_cache,
        plan_extraction,
        probe,
        probe_regularizers,
        verify,
    )
    from embrm.api.labels import annotate_labels, measure_strengths, read_labels, remedy_labels
    from embrm.api.models import confirm, export, finetune, score
    from embrm.api.results import SweepResults
    from embrm.api.sweeps import (
        benchmark_scores,
        best_of_n,
        open_results,
        plan_sweep,
        replay,
        report,
        suite_scores,
        sweep,
        train,
    )
    from embrm.api.trained import TrainedHead
    from embrm.cache.reader import Cache
    from embrm.core.errors import UserError
    from embrm.training.heads.kinds import register_head
    from embrm.training.objectives import register_loss
    from embrm.training.regularizers import RegularizerKind, register_regularizer

__version__ = "0.4.0"

_MODULES = {
    "api.caches": (
        *("adopt", "extract", "extract_shard", "list_caches", "merge", "open_cache"),
        *("plan_extraction", "probe", "probe_regularizers", "verify"),
    ),
    "api.labels": ("annotate_labels", "measure_strengths", "read_labels", "remedy_labels"),
    "api.models": ("confirm", "export", "finetune", "score"),
    "api.results": ("SweepResults",),
    "api.sweeps": (
        *("benchmark_scores", "best_of_n", "open_results", "plan_sweep", "replay", "report"),
        *("suite_scores", "sweep", "train"),
    ),
    "api.trained": ("TrainedHead",),
    "cache.reader": ("Cache",),
    "core.errors": ("UserError",),
    "training.heads.kinds": ("register_head",),
    "training.objectives": ("register_loss",),
    "training.regularizers": ("RegularizerKind", "register_regularizer"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Cache",
    "RegularizerKind",
    "SweepResults",
    "TrainedHead",
    "UserError",
    "adopt",
    "annotate_labels",
    "benchmark_scores",
    "best_of_n",
    "confirm",
    "export",
    "extract",
    "extract_shard",
    "finetune",
    "list_caches",
    "measure_strengths",
    "merge",
    "open_cache",
    "open_results",
    "plan_extraction",
    "plan_sweep",
    "probe",
    "probe_regularizers",
    "read_labels",
    "register_head",
    "register_loss",
    "register_regularizer",
    "remedy_labels",
    "replay",
    "report",
    "score",
    "suite_scores",
    "sweep",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'embrm' has no attribute {name!r}")
    value = getattr(import_module(f"embrm.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
