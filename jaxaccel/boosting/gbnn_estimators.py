"""GBNN with scikit-learn's face: `GBNNRegressor` and `GBNNClassifier`, for pipelines, grids and cross-validation.

Needs scikit-learn, which the extra ``estimators`` brings. Everything else is `jaxaccel.boosting.gbnn`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError("jaxaccel's estimators need scikit-learn: pip install jaxaccel[estimators]") from error

from jaxaccel.boosting.gbnn import Activation, GBNNParams, gbnn_apply, gbnn_fit

ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {"logistic": jax.nn.sigmoid, "tanh": jnp.tanh, "relu": jax.nn.relu, "gelu": jax.nn.gelu}
)
"""Activations by scikit-learn's names."""


class _GBNN(BaseEstimator):
    """What both share."""

    params_: GBNNParams

    def __init__(
        self,
        n_steps: Any = 200,
        *,
        units_per_step: Any = 1,
        learning_rate: Any = 0.1,
        subsample: Any = 0.5,
        activation: Any = "logistic",
        l2: Any = 1e-4,
        inner_steps: Any = 200,
        n_active: Any = None,
        random_state: Any = None,
    ) -> None:
        # As scikit-learn asks, arguments are kept as they are and looked at by fit.
        self.n_steps, self.units_per_step, self.learning_rate = n_steps, units_per_step, learning_rate
        self.subsample, self.activation, self.l2, self.inner_steps = subsample, activation, l2, inner_steps
        self.n_active, self.random_state = n_active, random_state

    def _activation(self) -> Activation:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        return ACTIVATIONS[self.activation]

    def _train(self, x: np.ndarray, y: np.ndarray, loss: str, classes: int | None = None) -> None:
        seed = check_random_state(self.random_state).randint(2**31 - 1)
        fit = gbnn_fit(
            np.asarray(x, np.float32), y, key=jax.random.key(seed), loss=loss, n_steps=self.n_steps,
            units_per_step=self.units_per_step, learning_rate=float(self.learning_rate),
            subsample=float(self.subsample), activation=self._activation(), l2=self.l2,
            inner_steps=self.inner_steps, num_classes=classes,
        )  # fmt: skip
        self.params_, self.train_loss_ = fit.params, np.asarray(fit.train_loss)
        self.n_iter_ = self.params_.num_steps

    def _outputs(self, x: Any) -> np.ndarray:
        check_is_fitted(self)
        x = np.asarray(validate_data(self, x, reset=False), np.float64)
        # Trained in float32, applied in float64: what scikit-learn's users expect of the order of rows and of dtypes.
        with jax.enable_x64(True):
            params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), self.params_)
            return np.asarray(gbnn_apply(params, jnp.asarray(x), n_active=self.n_active, activation=self._activation()))


class GBNNRegressor(RegressorMixin, _GBNN):
    """A network grown by gradient boosting, for one or several real targets.

    Args:
        n_steps: T, steps; the network has ``n_steps·units_per_step`` hidden units.
        units_per_step: J, units that a step adds.
        learning_rate: what each step is scaled by.
        subsample: share of rows that a step sees.
        activation: ``"logistic"``, ``"tanh"``, ``"relu"`` or ``"gelu"``.
        l2: penalty of each step.
        inner_steps: most steps of L-BFGS in each step.
        n_active: steps that predictions use, ``None`` for all; may be changed at any time after fitting.
        random_state: seed.

    Inputs should be standardised: put a ``StandardScaler`` before it.

    Example:
        >>> import numpy as np
        >>> x = np.linspace(-2, 2, 40)[:, None]
        >>> model = GBNNRegressor(4, learning_rate=0.5, inner_steps=20, random_state=0).fit(x, np.sin(x[:, 0]))
        >>> model.set_params(n_active=2).predict(x).shape
        (40,)
    """

    def fit(self, X: Any, y: Any) -> Any:
        """Train on ``X [n, d]`` and ``y [n]`` or ``[n, K]``."""
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=np.float64)
        self._single = y.ndim == 1
        self._train(X, np.asarray(y, np.float32), "squared")
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Predictions ``[n]`` or ``[n, K]`` of the first ``n_active`` steps."""
        f = self._outputs(X)
        return f[:, 0] if self._single else f

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class GBNNClassifier(ClassifierMixin, _GBNN):
    """A network grown by gradient boosting, for two or more classes.

    Arguments are those of `GBNNRegressor`; labels may be anything that scikit-learn sorts.
    """

    def fit(self, X: Any, y: Any) -> Any:
        """Train on ``X [n, d]`` and labels ``y [n]``.

        Raises:
            ValueError: labels of one class.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"the classifier needs at least two classes in y, got one class: {self.classes_[0]!r}")
        self._train(X, labels, "logistic" if len(self.classes_) == 2 else "softmax", len(self.classes_))
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """F: ``[n]`` for two classes (positive for the second), ``[n, K]`` for more."""
        f = self._outputs(X)
        return f[:, 0] if len(self.classes_) == 2 else f

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities ``[n, K]`` in the order of ``classes_``."""
        f = self._outputs(X)
        if len(self.classes_) == 2:
            f = np.concatenate([-f, f], 1)  # σ(2F) as a softmax
        exp = np.exp(f - f.max(1, keepdims=True))
        return np.asarray(exp / exp.sum(1, keepdims=True))

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class ``[n]``."""
        places = self.predict_proba(X).argmax(1)
        return np.asarray(self.classes_[places])
