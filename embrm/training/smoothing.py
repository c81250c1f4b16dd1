"""Iterative data smoothing: labels move towards the heads' predictions (arXiv 2401.16335)."""

from collections.abc import Sequence

import torch
from scipy.special import expit

from embrm.training.data import TrainingData
from embrm.training.heads.bank import Parameters, score_states
from embrm.training.heads.preprocess import Preprocess
from embrm.training.spec import TrainSpec


class MovingLabels:
    """The labels of each slot: y ← (1-β)·y + β·sigmoid(r_c - r_r) after every epoch."""

    def __init__(
        self, pack: Sequence[TrainSpec], data: TrainingData, preprocess: Preprocess
    ) -> None:
        pairs, device = data.train, data.states.values.device
        self.labels = pairs.label.to(device).expand(len(pack), -1).clone()
        """Labels of the N training pairs for every slot, float32 [P, N]."""
        self._beta = torch.tensor([[spec.data_smoothing] for spec in pack], device=device)
        self._rows, places = torch.cat([pairs.chosen, pairs.rejected]).unique(return_inverse=True)
        self._chosen, self._rejected = places[: len(pairs)], places[len(pairs) :]
        self._states, self._preprocess = data.states, preprocess

    @torch.no_grad()
    def update(self, parameters: Parameters) -> None:
        """Move the labels towards the probabilities that heads with these parameters predict."""
        r = score_states(parameters, self._preprocess, self._states, self._rows)
        delta = r.index_select(1, self._chosen) - r.index_select(1, self._rejected)
        # torch's sigmoid is not used: its bits depend on where in a vector register a number lies.
        predicted = torch.from_numpy(expit(delta.numpy())).to(self.labels.device)
        self.labels = (1 - self._beta) * self.labels + self._beta * predicted

    def keep(self, slots: Sequence[int]) -> None:
        """Keep these slots only."""
        chosen = torch.tensor(slots)
        self.labels, self._beta = self.labels[chosen], self._beta[chosen]
