"""Trees with scikit-learn's face: boosting, random forests and extra-trees, for pipelines, grids and cross-validation.

Needs scikit-learn, which the extra ``estimators`` brings. Everything else is `jaxaccel.boosting.trees`. Tables are
filled up to the next power of two of rows, which have no weight, so that compiled programs are used again; NaN is
allowed and goes left at every split.
"""

from typing import Any

import jax
import numpy as np

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError("jaxaccel's estimators need scikit-learn: pip install jaxaccel[estimators]") from error

from jaxaccel.boosting.trees import (
    Bins,
    BoostedTrees,
    Forest,
    boosted_fit,
    boosted_predict,
    feature_importances,
    fit_bins,
    forest_fit,
    forest_predict,
)

LEAST_ROWS = 256
"""Tables are filled up to so many rows at least."""


def _pad(array: np.ndarray, value: Any) -> np.ndarray:
    """Rows of ``value`` up to the next power of two."""
    rows = max(LEAST_ROWS, 1 << (len(array) - 1).bit_length())
    return np.pad(array, [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1), constant_values=value)


class _Trees(BaseEstimator):
    """What all share."""

    n_bins: Any
    categorical: Any
    random_state: Any
    model_: BoostedTrees | Forest
    classes_: np.ndarray

    def _check(self, x: Any, *target: Any, **settings: Any) -> Any:
        """By scikit-learn's rules; ``target`` is given for fitting."""
        found = validate_data(self, x, *target, dtype=np.float64, ensure_all_finite="allow-nan",
                              reset=bool(target), **settings)  # fmt: skip
        table = found[0] if target else found
        if (np.abs(table[~np.isnan(table)]) > np.finfo(np.float32).max).any():
            raise ValueError("X contains infinity or a value too large for float32")
        table = np.asarray(table, np.float32)
        return (table, found[1]) if target else table

    def _prepare(self, x: np.ndarray, sample_weight: Any) -> tuple[Bins, np.ndarray, np.ndarray, Any]:
        """Bins of the rows that have a weight, the table and weights filled up, and a key."""
        weight = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
        seen = np.where(weight[:, None] > 0, x, np.nan)
        bins = fit_bins(_pad(seen, np.nan), n_bins=self.n_bins, method="midpoint", categorical=self.categorical)
        seed = check_random_state(self.random_state).randint(2**31 - 1)
        return bins, _pad(x, np.nan), _pad(weight.astype(np.float32), 0), jax.random.key(seed)

    def _fit(self, x: np.ndarray, y: np.ndarray, sample_weight: Any) -> None:
        raise NotImplementedError

    def _apply(self, x: np.ndarray) -> Any:
        raise NotImplementedError

    def _outputs(self, x: Any) -> np.ndarray:
        check_is_fitted(self)
        table = self._check(x)
        return np.asarray(self._apply(_pad(table, np.nan))[: len(table)], np.float64)

    @property
    def feature_importances_(self) -> np.ndarray:
        """Share of each column in what splits gain: `jaxaccel.boosting.trees.feature_importances`."""
        check_is_fitted(self)
        return np.asarray(feature_importances(self.model_.trees, self.n_features_in_))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags


class _Regressor(RegressorMixin, _Trees):
    """Targets ``[n]`` or ``[n, K]``."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Train on ``X [n, d]`` and ``y [n]`` or ``[n, K]``; ``sample_weight [n]`` is not negative."""
        table, y = self._check(X, y, multi_output=True, y_numeric=True)
        y = np.asarray(y, np.float64)
        if (np.abs(y) > np.finfo(np.float32).max).any():
            raise ValueError("y contains a value too large for float32")
        self._single = y.ndim == 1
        self._fit(table, y.reshape(len(y), -1).astype(np.float32), sample_weight)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Predictions ``[n]`` or ``[n, K]``."""
        f = self._outputs(X)
        return f[:, 0] if self._single else f

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class _Classifier(ClassifierMixin, _Trees):
    """Labels of two or more classes."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Train on ``X [n, d]`` and labels ``y [n]``; ``sample_weight [n]`` is not negative.

        Raises:
            ValueError: labels of one class.
        """
        table, y = self._check(X, y)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        weight = _check_sample_weight(sample_weight, table, dtype=np.float64)
        found = {0: "no such row", 1: "one class"}.get(len(np.unique(labels[weight > 0])))
        if found:
            raise ValueError(f"the classifier needs at least two classes in rows of positive weight, got {found}")
        self._fit(table, labels, sample_weight)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities ``[n, K]`` in the order of ``classes_``."""
        raise NotImplementedError

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class ``[n]``."""
        places = self.predict_proba(X).argmax(1)
        return np.asarray(self.classes_[places])


class _Boosted(_Trees):
    """Settings of boosting."""

    model_: BoostedTrees

    def __init__(
        self,
        n_trees: Any = 100,
        *,
        max_depth: Any = 6,
        learning_rate: Any = 0.1,
        reg_lambda: Any = 1.0,
        min_data_in_leaf: Any = 1,
        subsample: Any = 1.0,
        feature_fraction: Any = 1.0,
        n_bins: Any = 63,
        categorical: Any = None,
        random_state: Any = None,
    ) -> None:
        # As scikit-learn asks, arguments are kept as they are and looked at by fit.
        self.n_trees, self.max_depth, self.learning_rate, self.reg_lambda = (
            n_trees,
            max_depth,
            learning_rate,
            reg_lambda,
        )
        self.min_data_in_leaf, self.subsample, self.feature_fraction = min_data_in_leaf, subsample, feature_fraction
        self.n_bins, self.categorical, self.random_state = n_bins, categorical, random_state

    def _boost(self, x: np.ndarray, y: np.ndarray, sample_weight: Any, loss: str, classes: int | None = None) -> None:
        bins, table, weight, key = self._prepare(x, sample_weight)
        self.model_ = boosted_fit(
            bins, table, _pad(y, 0), loss=loss, n_trees=self.n_trees, max_depth=self.max_depth,
            learning_rate=float(self.learning_rate), reg_lambda=self.reg_lambda,
            min_data_in_leaf=self.min_data_in_leaf, subsample=self.subsample,
            feature_fraction=self.feature_fraction, sample_weight=weight, num_classes=classes, key=key,
        )  # fmt: skip
        self.train_loss_ = np.asarray(self.model_.train_loss)

    def _apply(self, x: np.ndarray) -> Any:
        return boosted_predict(self.model_, x)


class BoostedTreesRegressor(_Regressor, _Boosted):
    """Gradient boosting of trees for one or several real targets.

    Args:
        n_trees: rounds.
        max_depth: of every tree, 1 to 12.
        learning_rate: what each tree is scaled by.
        reg_lambda: λ of leaves, −Σg/(Σh + λ).
        min_data_in_leaf: least rows of a leaf.
        subsample: share of rows that a round sees.
        feature_fraction: share of columns that a node sees.
        n_bins: most thresholds of a column.
        categorical: columns of categories, which are whole numbers.
        random_state: seed.

    Example:
        >>> x = np.linspace(-2, 2, 40)[:, None]
        >>> BoostedTreesRegressor(20, max_depth=2).fit(x, np.sin(x[:, 0])).predict(x).shape
        (40,)
    """

    def _fit(self, x: np.ndarray, y: np.ndarray, sample_weight: Any) -> None:
        self._boost(x, y, sample_weight, "squared")


class BoostedTreesClassifier(_Classifier, _Boosted):
    """Gradient boosting of trees for two or more classes.

    Arguments are those of `BoostedTreesRegressor`; labels may be anything that scikit-learn sorts.
    """

    def _fit(self, x: np.ndarray, y: np.ndarray, sample_weight: Any) -> None:
        self._boost(x, y, sample_weight, "logistic" if len(self.classes_) == 2 else "softmax", len(self.classes_))

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


class _Forests(_Trees):
    """Settings of forests."""

    model_: Forest
    _random_thresholds = False

    def __init__(
        self,
        n_trees: Any = 100,
        *,
        max_depth: Any = 10,
        min_data_in_leaf: Any = 1,
        feature_fraction: Any = 0.34,
        bootstrap: Any = True,
        n_bins: Any = 63,
        categorical: Any = None,
        random_state: Any = None,
    ) -> None:
        self.n_trees, self.max_depth, self.min_data_in_leaf = n_trees, max_depth, min_data_in_leaf
        self.feature_fraction, self.bootstrap, self.n_bins = feature_fraction, bootstrap, n_bins
        self.categorical, self.random_state = categorical, random_state

    def _fit(self, x: np.ndarray, y: np.ndarray, sample_weight: Any) -> None:
        bins, table, weight, key = self._prepare(x, sample_weight)
        targets = y if y.ndim == 2 else np.eye(len(self.classes_), dtype=np.float32)[y]
        self.model_ = forest_fit(
            bins, table, _pad(targets, 0), key, n_trees=self.n_trees, max_depth=self.max_depth,
            min_data_in_leaf=self.min_data_in_leaf, feature_fraction=self.feature_fraction, bootstrap=self.bootstrap,
            random_thresholds=self._random_thresholds, sample_weight=weight,
        )  # fmt: skip
        self.out_of_bag_ = np.asarray(self.model_.out_of_bag)[: len(x)]

    def _apply(self, x: np.ndarray) -> Any:
        return forest_predict(self.model_, x)


class RandomForestRegressor(_Regressor, _Forests):
    """A random forest for one or several real targets.

    Args:
        n_trees: number of trees.
        max_depth: of every tree, 1 to 64.
        min_data_in_leaf: least rows of a leaf.
        feature_fraction: share of columns that a node sees.
        bootstrap: whether each tree draws rows; ``out_of_bag_ [n, K]`` then are the means over trees without a row.
        n_bins: most thresholds of a column.
        categorical: columns of categories, which are whole numbers.
        random_state: seed.
    """


class _ForestClassifier(_Classifier, _Forests):
    def predict_proba(self, X: Any) -> np.ndarray:
        """Mean of the trees' shares of classes ``[n, K]``, in the order of ``classes_``."""
        p = np.maximum(self._outputs(X), 0)  # rounding may fall below
        return np.asarray(p / p.sum(1, keepdims=True))


class RandomForestClassifier(_ForestClassifier):
    """A random forest for two or more classes; arguments are those of `RandomForestRegressor`."""


class _ExtraTrees(_Forests):
    _random_thresholds = True

    def __init__(
        self,
        n_trees: Any = 100,
        *,
        max_depth: Any = 10,
        min_data_in_leaf: Any = 1,
        feature_fraction: Any = 0.34,
        bootstrap: Any = False,
        n_bins: Any = 63,
        categorical: Any = None,
        random_state: Any = None,
    ) -> None:
        super().__init__(
            n_trees, max_depth=max_depth, min_data_in_leaf=min_data_in_leaf, feature_fraction=feature_fraction,
            bootstrap=bootstrap, n_bins=n_bins, categorical=categorical, random_state=random_state,
        )  # fmt: skip


class ExtraTreesRegressor(_Regressor, _ExtraTrees):
    """Extra-trees, one random threshold for each node and column; arguments are those of `RandomForestRegressor`."""


class ExtraTreesClassifier(_ForestClassifier, _ExtraTrees):
    """Extra-trees for two or more classes; arguments are those of `RandomForestRegressor`."""
