"""llama.cpp as a contender: the engine that people on CPUs pick. Only where the package llama-cpp-python is installed.

It is no dependency: it is compiled from source, for the machine at hand. A build for another CPU crashes at its first
token; ``CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON"`` makes a portable one.
"""

import importlib
import importlib.util
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

KINDS = ("F32", "Q8_0", "Q4_1")


def rewrite(source: pathlib.Path, kind: str, target: pathlib.Path) -> pathlib.Path:
    """Write the weights of a GGUF file in another kind of numbers; vectors stay float32.

    Args:
        source: the file to read; its metadata come along.
        kind: name of a `gguf.GGMLQuantizationType` that the package can quantise to.
        target: the file to write.

    Returns:
        ``target``.
    """
    gguf: Any = importlib.import_module("gguf")
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0], *field.types[1:2])
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        wanted = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def models(origin: pathlib.Path, folder: pathlib.Path, length: int) -> Iterator[tuple[str, Any]]:
    """The file's weights in each kind, loaded for texts of up to ``length`` tokens; none without package or GGUF."""
    if importlib.util.find_spec("llama_cpp") is None or origin.suffix != ".gguf":
        return
    llama_cpp: Any = importlib.import_module("llama_cpp")
    threads = len(os.sched_getaffinity(0))
    for kind in KINDS:
        path = origin if kind in origin.name else rewrite(origin, kind, folder / f"{kind}.gguf")
        yield (
            f"llama.cpp {kind}",
            llama_cpp.Llama(str(path), n_ctx=length, n_threads=threads, n_threads_batch=threads, verbose=False),
        )


def generation(model: Any, prompt: Sequence[int], new: int) -> Callable[[], tuple[float, float, np.ndarray]]:
    """A call that continues the prompt greedily: seconds to the first token, of the rest, and the tokens."""

    def call() -> tuple[float, float, np.ndarray]:
        began, times, tokens = time.perf_counter(), [], []
        for token in model.generate(list(prompt), temp=0.0, top_k=1, reset=True):
            times.append(time.perf_counter())
            tokens.append(token)
            if len(tokens) == new:
                break
        return times[0] - began, times[-1] - times[0], np.asarray(tokens)

    return call
