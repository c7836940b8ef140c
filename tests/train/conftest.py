"""Batches of the run that tests of training share."""

import numpy as np
import pytest

from jlora.train import Batches


@pytest.fixture
def batches(rng):
    return Batches({"x": rng.standard_normal((12, 5)).astype(np.float32)}, size=4, seed=0)
