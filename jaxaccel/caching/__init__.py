"""Caching: keep less, or compute less often, of what a model remembers between steps."""

from jaxaccel.caching.snapkv import SnapKVSelection, compress, snapkv_select, snapkv_votes, snapkv_window

__all__ = ["SnapKVSelection", "compress", "snapkv_select", "snapkv_votes", "snapkv_window"]
