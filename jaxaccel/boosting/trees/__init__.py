"""Trees grown from histograms: one jitted builder for gradient boosting, forests and reinforcement learning.

Rows carry statistics: sums ``s`` and a weight ``w``. The value of a node is Σ_k s_k²/(w + λ), a split is worth what the
values of its two children are together, and the best one of all features and thresholds is taken.

| use | sums s | weight w | leaf |
| --- | --- | --- | --- |
| GBRL, cosine or l2 | gradients | rows | s/w |
| Newton boosting | gradients | second derivatives | −s/(w + λ) |
| regression forest | targets less their mean | rows drawn | s/w |
| classification forest | one-hot classes | rows drawn | s/w; the value is then Gini's, up to a constant |

- `bins`: thresholds of a table's columns, and its cells as numbers of bins.
- `boosted`: gradient boosting. `forests`: random forests and extra-trees.
- `growing`: `grow_tree`, heaps of up to depth 12. `deep`: `grow_deep_tree`, any depth.
- `splitting`: the search of the best split. `predicting`: values of rows.
"""

from jaxaccel.boosting.trees.bins import Bins, apply_bins, fit_bins
from jaxaccel.boosting.trees.boosted import BoostedTrees, boosted_fit, boosted_predict
from jaxaccel.boosting.trees.deep import DeepTree, grow_deep_tree
from jaxaccel.boosting.trees.forests import Forest, forest_fit, forest_predict
from jaxaccel.boosting.trees.growing import POLICIES, Tree, grow_tree
from jaxaccel.boosting.trees.predicting import feature_importances, fold_trees, predict_trees, tree_leaves
from jaxaccel.boosting.trees.splitting import SCORES

__all__ = [
    "POLICIES", "SCORES", "Bins", "BoostedTrees", "DeepTree", "Forest", "Tree", "apply_bins", "boosted_fit",
    "boosted_predict", "feature_importances", "fit_bins", "fold_trees", "forest_fit", "forest_predict",
    "grow_deep_tree", "grow_tree", "predict_trees", "tree_leaves",
]  # fmt: skip
