"""Candidate trees of speculative decoding: which guesses are worth checking together in one forward pass.

A *path* is a tuple of ranks: (a, b) is the a-th best token of head 0 followed by the b-th best of head 1. A *tree* is a
set of paths that holds every ancestor of each. Node 0, the root, is the token that the model itself has chosen; nodes
1, 2, ... are the paths, sorted by (length, ranks). Checking a tree costs one forward pass of all its nodes, in which a
node attends to the prefix, to its ancestors and to itself; what it gives is the longest path that turns out right.

If head k has the true token at rank r in a share a[k][r] of positions, and heads err independently of each other, a
path is right with probability Πₖ a[k][path[k]]. No two siblings are right at once, so a step yields

    1 + Σ over paths of Πₖ a[k][path[k]]

tokens on average (`expected_length`). No path is likelier than its ancestors, so that the num_nodes likeliest paths
are always a tree, and the best one of that size: `build_tree` lists them one by one, without looking at the others.

Trees are plain NumPy, made once and constant under ``jax.jit``.

Source: Cai et al., Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads, arXiv 2401.10774;
surveyed in Huang et al., arXiv 2406.10903.
"""

import heapq
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

Path = tuple[int, ...]
Row = Sequence[float] | Float[np.ndarray, "ranks"] | Float[jax.Array, "ranks"]
Accuracies = Sequence[Row] | Float[np.ndarray, "heads ranks"] | Float[jax.Array, "heads ranks"]


@dataclass(frozen=True)
class TreeBuffers:
    """A tree as index arrays. n nodes with the root, ``rows`` root-to-leaf paths, of at most ``depth`` guesses.

    Hashable, and equal to any tree of the same paths and ``top_k``: usable as a static argument of ``jax.jit``.

    Attributes:
        paths: the nodes but the root, sorted by length, then by ranks.
        top_k: ranks per head that ``tree_index`` leaves room for.
        attn_mask: whether node i sees node j: j is i or an ancestor of i.
        depth: guesses on the way to a node, 0 at the root; its position is that of the root plus this.
        parent: the node before; 0 at the root, which has none.
        tree_index: where a node's token stands in [root, top_k tokens of head 0, top_k tokens of head 1, ...].
        retrieve: nodes from the root to each leaf, deepest leaves first; 0 where ``valid`` is False.
        valid: which entries of ``retrieve`` are nodes. Padding must never be compared with anything.
    """

    paths: tuple[Path, ...]
    top_k: int
    attn_mask: Bool[np.ndarray, "n n"] = field(compare=False, repr=False)
    depth: Int[np.ndarray, "n"] = field(compare=False, repr=False)  # int32, also below
    parent: Int[np.ndarray, "n"] = field(compare=False, repr=False)
    tree_index: Int[np.ndarray, "n"] = field(compare=False, repr=False)
    retrieve: Int[np.ndarray, "rows columns"] = field(compare=False, repr=False)  # columns = max_depth + 1
    valid: Bool[np.ndarray, "rows columns"] = field(compare=False, repr=False)

    @property
    def num_nodes(self) -> int:
        """Nodes with the root: tokens in one forward pass."""
        return len(self.paths) + 1

    @property
    def max_depth(self) -> int:
        """Guesses on the longest path: heads that the tree reads."""
        return self.retrieve.shape[1] - 1


def _accuracies(accuracies: Accuracies) -> list[np.ndarray]:
    """Return one float64 row per head; heads may know different numbers of ranks."""
    rows = [np.asarray(row, np.float64) for row in accuracies]
    if not rows or any(row.ndim != 1 or row.size == 0 for row in rows):
        raise ValueError(
            f"accuracies must hold one non-empty row of ranks per head, got shapes {[row.shape for row in rows]}"
        )
    for head, row in enumerate(rows):
        # Ranks exclude each other, so that shares of one head add up to at most 1, but for rounding.
        if not (np.isfinite(row).all() and (row >= 0).all() and row.sum() <= 1 + 1e-6):
            raise ValueError(f"accuracies[{head}] must be shares >= 0 that sum to at most 1, got {row.tolist()}")
    return rows


def _check_paths(paths: Sequence[Sequence[int]]) -> list[Path]:
    """Return the paths as tuples of int, sorted; complain about what is no tree."""
    out = [tuple(operator.index(rank) for rank in path) for path in paths]
    known = set(out)
    if len(known) != len(out):
        twice = next(path for i, path in enumerate(out) if path in out[:i])
        raise ValueError(f"paths must differ, got {twice} more than once")
    for path in out:
        if not path:
            raise ValueError("paths must not hold the empty path (): the root is implied")
        if min(path) < 0:
            raise ValueError(f"paths must hold ranks >= 0, got {path}")
        if len(path) > 1 and path[:-1] not in known:
            raise ValueError(f"paths must hold every ancestor, got {path} without {path[:-1]}")
    return sorted(out, key=lambda path: (len(path), path))


def build_tree(accuracies: Accuracies, num_nodes: int, *, max_depth: int | None = None) -> tuple[Path, ...]:
    """List the ``num_nodes`` likeliest paths, likeliest first: the tree with the most expected tokens per step.

    Every beginning of the list is the best tree of its own size, so one long list gives trees of all sizes. The order
    of equally likely paths is fixed: fewer guesses first, then lower ranks.

    Args:
        accuracies: ``accuracies[k][r]``, the share of positions where the token that the model goes on to emit is the
            r-th best of head k (`jaxaccel.decoding.rank_accuracies`). Rows may differ in length and need not fall.
        num_nodes: paths to list, not counting the root.
        max_depth: most guesses in a row; as many as there are heads if ``None``.

    Returns:
        Paths for `make_tree`.

    Raises:
        ValueError: if an accuracy is not a share, ``max_depth`` is not between 1 and the number of heads, or
            ``num_nodes`` is below 1 or above the number of paths that there are.

    >>> build_tree([[0.6, 0.2], [0.5, 0.1]], 4)
    ((0,), (0, 0), (1,), (1, 0))
    """
    rows = _accuracies(accuracies)
    depth = len(rows) if max_depth is None else operator.index(max_depth)
    if not 1 <= depth <= len(rows):
        raise ValueError(f"max_depth must be between 1 and the number of heads ({len(rows)}), got {max_depth}")
    available = sum(math.prod(row.size for row in rows[:length]) for length in range(1, depth + 1))
    if not 1 <= operator.index(num_nodes) <= available:
        raise ValueError(f"num_nodes must be between 1 and {available}, the paths that there are, got {num_nodes}")
    # With ranks in the order of their accuracy, a path's next sibling and its first child are both at most as likely
    # as the path. Each path is reached in one way only, so a heap yields all of them in order.
    orders = [np.argsort(-row, kind="stable") for row in rows]

    def entry(places: Path) -> tuple[float, int, Path, Path]:
        path = tuple(int(orders[head][place]) for head, place in enumerate(places))
        return -math.prod(float(rows[head][rank]) for head, rank in enumerate(path)), len(path), path, places

    heap, chosen = [entry((0,))], list[Path]()
    while len(chosen) < num_nodes:
        *_, path, places = heapq.heappop(heap)
        chosen.append(path)
        if places[-1] + 1 < rows[len(places) - 1].size:
            heapq.heappush(heap, entry((*places[:-1], places[-1] + 1)))
        if len(places) < depth:
            heapq.heappush(heap, entry((*places, 0)))
    return tuple(chosen)


def expected_length(paths: Sequence[Sequence[int]], accuracies: Accuracies) -> float:
    """Tokens per step that a tree yields on average, the root's among them: 1 + Σ over paths of Πₖ a[k][path[k]].

    Args:
        paths: a tree, as for `make_tree`.
        accuracies: as for `build_tree`; ranks that a row does not list count as never right.

    Returns:
        A number between 1 and the tree's depth + 1. Heads that are right at the same positions, as real ones are, yield
        more than this.

    Raises:
        ValueError: if the paths are no tree or go deeper than there are heads, or an accuracy is not a share.

    >>> round(expected_length([(0,), (1,), (0, 0)], [[0.6, 0.2], [0.5, 0.1]]), 3)
    2.1
    """
    rows = _accuracies(accuracies)
    total = 1.0
    for path in _check_paths(paths):
        if len(path) > len(rows):
            raise ValueError(f"paths must be at most as long as there are heads ({len(rows)}), got {path}")
        total += math.prod(float(rows[head][rank]) if rank < rows[head].size else 0.0 for head, rank in enumerate(path))
    return total


def make_tree(paths: Sequence[Sequence[int]], top_k: int = 10) -> TreeBuffers:
    """Lay a tree out as index arrays.

    Args:
        paths: tuples of ranks, in any order, with all their ancestors. None at all gives the root alone, that is plain
            decoding of one token per step.
        top_k: tokens that are taken from each head. Ranks must be below it; a smaller one makes proposing cheaper.

    Returns:
        The tree.

    Raises:
        ValueError: if a path is listed twice or lacks an ancestor, or a rank is negative or not below ``top_k``.

    >>> tree = make_tree([(0,), (1,), (0, 0)])
    >>> tree.depth.tolist(), tree.parent.tolist(), tree.tree_index.tolist()
    ([0, 1, 1, 2], [0, 0, 0, 1], [0, 1, 2, 11])
    >>> tree.attn_mask[3].tolist()  # the last node sees the root, node 1 and itself
    [True, True, False, True]
    >>> tree.retrieve.tolist(), tree.valid[1].tolist()
    ([[0, 1, 3], [0, 2, 0]], [True, True, False])
    """
    ordered = _check_paths(paths)
    top_k = operator.index(top_k)
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    for path in ordered:
        if max(path) >= top_k:
            raise ValueError(f"paths must hold ranks below top_k = {top_k}, got {path}")
    number = {(): 0} | {path: i for i, path in enumerate(ordered, 1)}
    n, max_depth = len(number), max(map(len, number))
    routes = [[number[path[:length]] for length in range(len(path) + 1)] for path in number]

    attn_mask = np.zeros((n, n), bool)
    for node, route in enumerate(routes):
        attn_mask[node, route] = True
    parents = [0, *(number[path[:-1]] for path in ordered)]
    # Leaves in reverse order: row 0 belongs to a deepest path, as in the reference code.
    leaves = [node for node in reversed(range(n)) if node not in parents[1:]]
    retrieve = np.zeros((len(leaves), max_depth + 1), np.int32)
    valid = np.zeros(retrieve.shape, bool)
    for row, leaf in enumerate(leaves):
        retrieve[row, : len(routes[leaf])] = routes[leaf]
        valid[row, : len(routes[leaf])] = True
    tree_index = [0, *(1 + top_k * (len(path) - 1) + path[-1] for path in ordered)]
    depth = [len(path) for path in number]
    depths, parent, index = (np.asarray(values, np.int32) for values in (depth, parents, tree_index))
    for array in (attn_mask, depths, parent, index, retrieve, valid):
        array.setflags(write=False)  # a tree is a key of jit's cache: its arrays must stay what its paths say
    return TreeBuffers(tuple(ordered), top_k, attn_mask, depths, parent, index, retrieve, valid)


def chain(depth: int) -> TreeBuffers:
    """Return the tree of a single path, each head's best guess: classic speculative decoding of ``depth`` tokens.

    Args:
        depth: guesses in a row; 0 is plain decoding.

    Returns:
        The tree, with ``top_k`` = 1.

    Raises:
        ValueError: if ``depth`` is negative.

    >>> chain(2).paths, chain(2).retrieve.tolist()
    (((0,), (0, 0)), [[0, 1, 2]])
    """
    if operator.index(depth) < 0:
        raise ValueError(f"depth must be at least 0, got {depth}")
    return make_tree([(0,) * length for length in range(1, depth + 1)], top_k=1)


def tree_from_parents(parents: Sequence[int] | Int[np.ndarray, "n"]) -> tuple[TreeBuffers, Int[np.ndarray, "n"]]:
    """Lay out a tree that is given by the parent of each of its n guesses.

    Args:
        parents: of guess i, the number of the guess before it, or -1 for one that follows the root. A guess comes after
            its parent.

    Returns:
        The tree, and which guess its nodes 1, 2, ... are: a tree numbers its nodes level by level.

    Raises:
        ValueError: if a parent does not come before its child.

    >>> tree, order = tree_from_parents([-1, 0, -1])
    >>> tree.paths, order.tolist()
    (((0,), (1,), (0, 0)), [0, 2, 1])
    """
    places: list[Path] = []
    children = [0] * (len(parents) + 1)
    for guess, value in enumerate(parents):
        parent = operator.index(value)
        if not -1 <= parent < guess:
            raise ValueError(
                f"tree_parent[{guess}] is {parent}, expected -1 (the root) or the number of an earlier guess: a guess "
                "comes after its parent"
            )
        places.append((places[parent] if parent >= 0 else ()) + (children[parent],))
        children[parent] += 1
    tree = make_tree(places, top_k=max(children, default=0) or 1)
    number = {place: guess for guess, place in enumerate(places)}
    return tree, np.array([number[path] for path in tree.paths], np.int32)
