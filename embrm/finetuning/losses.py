"""The loss of a run, as a sum over the micro-batches of a minibatch: exact however it is cut."""

from collections.abc import Sequence

from torch import Tensor

from embrm.finetuning.contrast import Contrast
from embrm.finetuning.spec import FinetuneRun
from embrm.training.objectives import ObjectiveBank
from embrm.training.pairs import PairRewards
from embrm.training.regularizers import grm_values


class StepLoss:
    """The loss that a sweep minimises, for one run; R of grm-* is computed exactly.

    A minibatch's loss is a mean over its pairs, hence the sum of its micro-batches' means times
    their shares. A penalty of the mean reward, such as BSR, is not: its tangent at the minibatch's
    mean is used, which must be known beforehand (see `objectives.Penalty`). SimCSE is treated in
    the same way (see `embrm.finetuning.contrast`).
    """

    def __init__(
        self, run: FinetuneRun, batch: int, *, soft_labels: bool, mean_over: int | None = None
    ) -> None:
        """batch: pairs of a minibatch. mean_over: pairs of a micro-batch, if r̄ is its mean instead.

        `needs_mean` says whether a call needs the mean reward of the minibatch.
        """
        self._arguments = [run], mean_over or batch
        self.needs_mean = run.reads_batch_mean and mean_over is None
        self._regularizer = run.active_regularizer
        self._l2 = run.l2
        self._simcse = run.simcse
        self._soft_labels = soft_labels
        self._bank: ObjectiveBank | None = None

    def __call__(
        self,
        r: Tensor,
        S: Tensor | None,
        squares: Tensor,
        features: Tensor | None = None,
        *,
        label: Tensor,
        weight: Tensor,
        margin: Tensor | None,
        numbers: Sequence[Tensor] = (),
        reference: Tensor | None = None,
        mean_reward: Tensor | None = None,
        contrast: Contrast | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the mean loss and R of a micro-batch of b pairs, not yet times its share.

        r: float32 [2b], rewards of the chosen, then the rejected responses. squares: the head's
        ‖parameters‖². label, weight, margin: float32 [b]. mean_reward: r̄ of the minibatch, if
        `needs_mean`. For grm-*: S, float32 [k], log-probabilities of the k responses that R depends
        on; reference: theirs under the reference model; numbers: int64 [b] twice, which of the k
        are the chosen and the rejected responses of the pairs. For SimCSE: features, float32
        [2, 2b, d], of two views, and contrast, the value and gradient of L_cl.
        """
        if self._bank is None:
            self._bank = ObjectiveBank(
                *self._arguments, soft_labels=self._soft_labels, device=r.device
            )
        bank = self._bank
        won, lost = r[None].chunk(2, dim=1)
        rewards = PairRewards.of(won, lost, bank.totals, bank.means)
        batch_mean = None if mean_reward is None else mean_reward.expand(len(bank.means))
        loss = bank.data_loss(rewards, label, weight, margin, batch_mean)[0]
        R = loss.new_zeros(())
        if self._regularizer is not None and S is not None and reference is not None:
            chosen, rejected = numbers
            change = S - reference
            R = grm_values(self._regularizer, S, change, chosen, rejected, label, weight).mean()
            loss = self._regularizer.loss_factor * loss + self._regularizer.value_factor * R
        if self._simcse is not None and features is not None and contrast is not None:
            loss = loss + self._simcse.weight * contrast.part(features)
        return loss + self._l2 / 2 * squares, R.detach()
