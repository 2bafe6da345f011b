"""kernels_pallas: hot paths as Pallas kernels, one subpackage an op; it knows nothing of jaxaccel.

An op is a folder:

- ``__init__.py``: the public function; checks shapes, picks the implementation, owns the custom VJP.
- ``reference.py``: the equation, naively; everything else is tested against it.
- ``xla.py``: the fastest formulation without Pallas, the default on CPU.
- ``tpu.py``: Pallas for TPUs (Mosaic).
- ``gpu.py``: Pallas for GPUs (Triton or Mosaic GPU).

Every public function takes ``implementation``, which `kernels_pallas.dispatch.resolve_implementation` resolves.
What all ops need to know about their arrays is in `kernels_pallas.arrays`.
"""
