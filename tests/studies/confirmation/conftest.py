"""Fixtures: made-up results of a sweep and of its fine-tune, and the comparison of the two."""

import pytest
from small_stage import SPLITS
from two_stages import EXCLUDED, MATCHES, frozen_results, full_results

from embrm.results.ledger import Results
from embrm.studies.confirmation.measure import Confirmation, compare_stages


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return frozen_results(tmp_path_factory.mktemp("frozen"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return full_results(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def confirmation(frozen: Results, full: Results) -> Confirmation:
    return compare_stages(frozen, full, MATCHES, EXCLUDED, "bt", SPLITS)
