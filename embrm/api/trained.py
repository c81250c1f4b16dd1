"""A reward head that was trained in this process."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

from embrm.api.arguments import public
from embrm.core.errors import UserError, nearest
from embrm.core.text import quoted

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from numpy.typing import NDArray

    from embrm.cache.reader import Cache
    from embrm.results.in_process import TrainedHere
    from embrm.sweeps.spec import RunSpec


class TrainedHead:
    """One run of `embrm.train`."""

    def __init__(self, cache: Cache, result: TrainedHere) -> None:
        self._cache, self._result = cache, result

    def __repr__(self) -> str:
        found = f"best epoch {self.best_epoch}" if self.status == "ok" else self.status
        return f"TrainedHead({self.name!r}: {self.spec.head}, {self.spec.loss}, {found})"

    @property
    def name(self) -> str:
        """The spec's name, or "run" and its number."""
        return self._result.run.name

    @property
    def run_id(self) -> str:
        """The id that a sweep gives to the same run."""
        return self._result.run.run_id

    @property
    def spec(self) -> RunSpec:
        """The run's spec, every key filled in."""
        return self._result.run.spec

    @property
    def status(self) -> str:
        """ "ok", or "diverged" where a loss, a weight or a reward was not finite."""
        return str(self._result.row["status"])

    @property
    def best_epoch(self) -> int:
        """The epoch whose weights were kept, 0 for a diverged run."""
        return self._result.row["best_epoch"] or 0

    @property
    def curve(self) -> pl.DataFrame:
        """One row per epoch: losses, validation metrics, rewards, norms."""
        return self._result.curve

    @cached_property
    def metrics(self) -> dict[str, float | None]:
        """`METRIC@SPLIT` → value on each evaluated split, and the validation metrics."""
        row = self._result.row
        kept = ("train_loss", "validation_nll", "validation_accuracy", "temperature")
        return {name: value for name, value in row.items() if "@" in name or name in kept}

    @cached_property
    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Parameters by name, float32 [members, ...]. Raises: UserError for a diverged run."""
        saved = self._result.saved
        if saved is None:
            raise UserError(f"{self.name!r} diverged and has no weights: lower lr")
        return {name: tensor.numpy() for name, tensor in saved.parameters.items()}

    @overload
    def rewards(self, of: str) -> pl.DataFrame: ...
    @overload
    def rewards(self, of: NDArray[Any]) -> NDArray[np.float32]: ...

    @public
    def rewards(self, of: str | NDArray[Any]) -> pl.DataFrame | NDArray[np.float32]:
        """Rewards of a split's pairs, or of states of your own.

        of: a split of the cache: a table of its pairs with scores_chosen and scores_rejected (or,
            of a split that has only groups, of their responses with `score`); or states float32
            [n, d] of the view that the run reads: float32 [n].

        Raises: UserError for an unknown split, states of another width, and a diverged run.
        """
        import numpy as np
        import torch

        from embrm.results.rewards import (
            member_scores,
            pair_scores,
            rewards_of_responses,
            rewards_of_states,
        )
        from embrm.sweeps.tables import read_tables

        _ = self.weights  # refuses a diverged run
        saved = self._result.saved
        assert saved is not None
        cache = self._cache
        if not isinstance(of, str):
            width = self._width()
            try:
                states = np.asarray(of, np.float32)
            except (TypeError, ValueError):
                raise UserError(
                    f"of = {quoted(of)}: give a split of the cache, or states [n, {width}]"
                ) from None
            if states.ndim != 2 or states.shape[1] != width:
                raise UserError(
                    f"states have shape {list(states.shape)}: give [n, {width}], of the view "
                    f"{self.spec.state!r}"
                )
            return rewards_of_states(saved, torch.from_numpy(states))
        selection = self._result.selection
        tables = read_tables(cache, selection.scenarios, selection.data_seed)
        if of not in tables.splits:
            raise UserError(f"split {of!r} is not in {cache.folder}: {nearest(of, tables.splits)}")
        [scored] = rewards_of_responses(cache, [saved], np.arange(cache.manifest.n_responses))
        pairs = tables.pairs.filter(split=of)
        if pairs.height:
            return pair_scores(pairs, cache.responses["n_response"], scored)
        members = tables.members.filter(split=of)
        return member_scores(members, cache.responses["n_response"], scored)

    def _width(self) -> int:
        from embrm.sweeps.views import open_view

        return open_view(self._cache, self.spec.state).shape[1]
