"""Whether exported files give the classifier's logits."""

from __future__ import annotations

import numpy as np

from rnnopt.errors import InputError

# Of logits; and of the largest logit, where that allows more: float32 has seven digits.
ABSOLUTE, RELATIVE = 1e-4, 1e-5


def require_agreement(found: np.ndarray, wanted: np.ndarray, kind: str) -> float:
    """Compare logits (B, C) of exported files with the classifier's.

    Args:
        found: by another library.
        wanted: by the classifier.
        kind: of encoder, for the error.

    Returns:
        The largest difference.

    Raises:
        InputError: it is larger than `ABSOLUTE` and than `RELATIVE` times the largest logit.
    """
    difference = float(np.abs(found - wanted).max())
    allowed = max(ABSOLUTE, RELATIVE * float(np.abs(wanted).max()))
    if not difference <= allowed:
        raise InputError(
            f"its logits differ by up to {difference:.1e} from the classifier's, and {allowed:.0e} "
            f"is allowed; this encoder ({kind}) can't be exported"
        )
    return difference
