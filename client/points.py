"""From a probability to scorecard points: a fixed number of points doubles the odds ("points to double the odds", PDO).

    points = offset - factor * logit,   factor = pdo / ln 2,   offset = base_score - factor * ln(base_odds)

where logit is that of the bad outcome (Siddiqi 2006, "Credit Risk Scorecards", chapter 6). More points, less risk: a
record whose odds of the good outcome are `base_odds` to 1 has `base_score` points, and with `pdo` more they double.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from metarisk_common.config import Frozen


class PointScale(Frozen):
    """How a bank writes risk as points. Any choice orders records alike."""

    base_score: float = Field(default=600.0, allow_inf_nan=False)
    """Points of a record with odds of `base_odds`."""
    base_odds: float = Field(default=50.0, gt=0, allow_inf_nan=False)
    """Records with the good outcome to each one with the bad."""
    pdo: float = Field(default=20.0, gt=0, allow_inf_nan=False)
    """Points that double the odds of the good outcome."""

    @property
    def factor(self) -> float:
        """Points for one unit of the logit."""
        return self.pdo / math.log(2)

    @property
    def offset(self) -> float:
        """Points of a record whose outcome is a toss of a coin."""
        return self.base_score - self.factor * math.log(self.base_odds)

    def points(self, logits: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Give whole points, `(rows,)`, of logits of the bad outcome, `(rows,)` and finite."""
        return np.rint(self.offset - self.factor * np.asarray(logits, np.float64)).astype(np.int64)
