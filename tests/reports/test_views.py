"""What a page shows of a curve."""

import numpy as np

from torchprobe.reports.views import thinned


def test_a_long_curve_keeps_its_ends_its_extremes_and_what_is_not_finite():
    values = np.zeros(5000)
    values[[1234, 2345, 3456]] = 7.0, -3.0, np.nan
    kept = thinned(values, 300)
    assert {0, 1234, 2345, 3456, 4999} <= set(kept)
    assert len(kept) <= 300
    assert (np.diff(kept) > 0).all()
    assert list(thinned(values[:300], 300)) == list(range(300))
