"""The data that runs are trained on: states, pairs, and token rows for regularizers."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from embrm.training.heads.preprocess import Preprocess, PreprocessKind, fit_preprocess
from embrm.training.pairs import Pairs
from embrm.training.regularizers import mean_fisher
from embrm.training.row_store import RowStore
from embrm.training.token_rows import TokenStore, TopK


@dataclass(frozen=True)
class TrainingData:
    """The data of one or more runs.

    states: on the device that trains. train, validation: pairs on the CPU, as rows of `states`;
    without validation pairs there is no early stopping and the last epoch's weights are kept.
    tokens: token rows, for regularizers. whole: for a bootstrap resample, the data
    that it was drawn from, to which preprocessing and F̄ are fitted; else None.
    """

    states: RowStore
    train: Pairs
    validation: Pairs
    tokens: TokenStore | None = None
    whole: "TrainingData | None" = None
    _fitted: dict[PreprocessKind, Preprocess] = field(default_factory=dict, init=False, repr=False)
    _fishers: dict[TopK, Tensor] = field(default_factory=dict, init=False, repr=False)

    def resampled(self, rows: Tensor) -> "TrainingData":
        """Replace the training pairs by those with the numbers `rows`, int64, as for a bootstrap
        resample; a number may occur several times."""
        return replace(self, train=self.train.take(rows), whole=self)

    def preprocess(self, kind: PreprocessKind) -> Preprocess:
        """Fit the preprocessing to the training responses, once."""
        if self.whole is not None:
            return self.whole.preprocess(kind)
        if kind not in self._fitted:
            self._fitted[kind] = fit_preprocess(kind, self.states, self.responses())
        return self._fitted[kind]

    def fisher(self, top_k: TopK) -> Tensor:
        """Compute F̄ of the training responses, for the regularizer "fisher", once."""
        assert self.tokens is not None  # `train` has checked this.
        if self.whole is not None:
            return self.whole.fisher(top_k)
        if top_k not in self._fishers:
            self._fishers[top_k] = mean_fisher(self.tokens, self.responses(), top_k)
        return self._fishers[top_k]

    def responses(self) -> Tensor:
        """List the training responses as rows of the states, int64, ascending."""
        return torch.cat([self.train.chosen, self.train.rejected]).unique()
