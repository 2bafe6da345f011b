"""Boosting: models that grow by steps, each fitted to what the last ones left.

- `gbnn`: a hidden layer grown unit by unit, whose last units can be left out at inference.
- `gbrl`: actors and critics as boosted trees, one for each step of gradient descent.
- `trees`: the histogram tree builder they stand on.
- `losses`: losses, residuals and Newton steps that boosting methods share.
"""

from jaxaccel.boosting.gbnn import GBNNFit, GBNNParams, gbnn_apply, gbnn_fit, gbnn_staged, gbnn_to_mlp, mlp_apply
from jaxaccel.boosting.gbrl import (
    GBRLState,
    LinearSchedule,
    clip_gradients,
    gbrl_fit,
    gbrl_init,
    gbrl_predict,
    gbrl_step,
)
from jaxaccel.boosting.losses import Loss, encode_targets, mean_loss, newton_step, residuals

__all__ = [
    "GBNNFit", "GBNNParams", "GBRLState", "LinearSchedule", "Loss", "clip_gradients", "encode_targets",
    "gbnn_apply", "gbnn_fit", "gbnn_staged", "gbnn_to_mlp", "gbrl_fit", "gbrl_init", "gbrl_predict", "gbrl_step",
    "mean_loss", "mlp_apply", "newton_step", "residuals",
]  # fmt: skip
