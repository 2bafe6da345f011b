"""A network as C++ for high-level synthesis, with a testbench that checks its bits.

`export_hls` writes two files: a header with one ``typedef ap_fixed<W, I, Q, O>`` for each tensor, the raw integers of
all weights and one function, whose operators are those of `int_forward` in the same order; and a testbench with inputs
and the outputs that are expected, which fails if a single bit differs. Both compile with a vendor's tools, and with any
C++ compiler and the open headers of ap_fixed (`jaxaccel.models.weights.ap_types.fetch_ap_types`):

    g++ -std=c++17 -I ap_types network_tb.cpp -o network_tb && ./network_tb

The code is plain loops without directives: what to unroll, pipeline and partition depends on the device. Constant
weights with few ones (`k_hot`) become shifts and additions when the loops over them are unrolled.

Source: the export that arXiv 2401.17544 describes; its code is not published.
"""

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxaccel.compression.fixed_point.formats import FixedPoint, split_channels
from jaxaccel.compression.fixed_point.integer import check_params, check_raw, int_forward
from jaxaccel.compression.fixed_point.spec import Node, Spec

_Q = {
    "rnd": "AP_RND",
    "rnd_zero": "AP_RND_ZERO",
    "rnd_min_inf": "AP_RND_MIN_INF",
    "rnd_inf": "AP_RND_INF",
    "rnd_conv": "AP_RND_CONV",
    "trn": "AP_TRN",
    "trn_zero": "AP_TRN_ZERO",
}
_O = {"sat": "AP_SAT", "sat_zero": "AP_SAT_ZERO", "sat_sym": "AP_SAT_SYM", "wrap": "AP_WRAP"}

_HELPERS = """\
// A number from its raw integer, and back.
template <class T>
inline T fixed_from_raw(long long raw) {
  T value;
  value.range(T::width - 1, 0) = ap_int<64>(raw).range(T::width - 1, 0);
  return value;
}

template <class T>
inline long long fixed_to_raw(const T& value) {
  ap_int<64> raw = (value < 0) ? -1 : 0;
  raw.range(T::width - 1, 0) = value.range(T::width - 1, 0);
  return raw.to_int64();
}
"""


def cpp_type(fmt: FixedPoint) -> str:
    """The C++ type of a format.

    >>> cpp_type(FixedPoint(8, 5))
    'ap_fixed<8, 3, AP_RND, AP_SAT>'
    """
    kind = "ap_fixed" if fmt.signed else "ap_ufixed"
    return f"{kind}<{fmt.word}, {fmt.integer_bits}, {_Q[fmt.rounding]}, {_O[fmt.overflow]}>"


def _wide(word: int, frac: int, signed: bool) -> str:
    """An exact type; truncation and wrapping, its defaults, never act."""
    return f"{'ap_fixed' if signed else 'ap_ufixed'}<{word}, {word - frac}>"


def _array(kind: str, name: str, values: Any) -> str:
    flat = [str(int(v)) for v in np.ravel(values)]
    lines = [", ".join(flat[i : i + 24]) for i in range(0, len(flat), 24)]
    body = ",\n  ".join(lines)
    return f"static const {kind} {name}[{len(flat)}] = {{\n  {body}}};"


def _aligned(node: Node, w: Any) -> tuple[np.ndarray, str, int, int]:
    """Weights whose channels share one binary point, their type, word and F: zeros are appended, values stay."""
    assert node.w is not None
    kind, frac = split_channels(node.w)
    w = np.asarray(w, np.int64)
    if not isinstance(frac, tuple):
        return w, cpp_type(kind), kind.word, kind.frac
    word, most = kind.word + max(frac) - min(frac), max(frac)
    if word > 62:
        raise ValueError(f"{node.name}: binary points of channels go from {min(frac)} to {most}, expected fewer than "
                         f"{62 - kind.word} apart")  # fmt: skip
    return w << (most - np.asarray(frac)), _wide(word, most, kind.signed), word, most


def _declarations(spec: Spec, node: Node, params: Mapping[str, Any]) -> Iterator[str]:
    name, (_, fmt) = node.name, spec.of(node.sources[0])
    yield f"typedef {cpp_type(node.out)} {name}_t;"
    if node.op in ("dense", "conv"):
        w, w_type, word, frac = _aligned(node, params["w"])
        terms = w.size // w.shape[-1]
        kind, _ = split_channels(node.w)
        yield f"typedef {w_type} {name}_w_t;"
        sum_word = fmt.word + word + terms.bit_length() + 1
        yield f"typedef {_wide(sum_word, fmt.frac + frac, fmt.signed or kind.signed)} {name}_sum_t;"
        if node.acc is not None:
            yield f"typedef {cpp_type(node.acc)} {name}_acc_t;"
        yield _array("long long" if word > 31 else "int", f"{name}_w_raw", w)
    if node.op == "scale":
        assert isinstance(node.w, FixedPoint)
        yield f"typedef {cpp_type(node.w)} {name}_a_t;"
        yield _array("int", f"{name}_a_raw", params["a"])
    if node.b is not None:
        yield f"typedef {cpp_type(node.b)} {name}_b_t;"
        yield _array("int", f"{name}_b_raw", params["b"])
    if node.op == "mean":
        steps = _halvings(node)
        yield f"typedef {_wide(fmt.word + 2 * steps + 1, fmt.frac + steps, fmt.signed)} {name}_sum_t;"


def _halvings(node: Node) -> int:
    count = node.kernel[0] * node.kernel[1]
    if count & (count - 1):
        raise ValueError(f"{node.name}: the mean of {count} numbers needs a divider, expected a power of two")
    return count.bit_length() - 1


def _bias(node: Node, index: str) -> str:
    return "" if node.b is None else f" + fixed_from_raw<{node.name}_b_t>({node.name}_b_raw[{index}])"


def _store(node: Node, index: str, channel: str, indent: str) -> list[str]:
    """Cast the sum (to the accumulator first, if it has a format), add the bias, cast to the output."""
    value = f"{node.name}_acc_t(sum)" if node.acc is not None else "sum"
    return [f"{indent}{node.name}[{index}] = {node.name}_t({value}{_bias(node, channel)});"]


def _body(spec: Spec, node: Node) -> list[str]:
    name, source = node.name, node.sources[0]
    shape, _ = spec.of(source)
    size = int(np.prod(node.shape))
    # A narrow accumulator is declared as such: every += casts.
    total = f"{name}_{'acc' if node.accumulate == 'stepwise' else 'sum'}_t sum = 0;"
    weight = f"fixed_from_raw<{name}_w_t>({name}_w_raw"
    if node.op == "dense":
        inner, units = int(np.prod(shape)), node.shape[0]
        return [
            f"  for (int n = 0; n < {units}; n++) {{",
            f"    {total}",
            f"    for (int k = 0; k < {inner}; k++) sum += {source}[k] * {weight}[k * {units} + n]);",
            *_store(node, "n", "n", "    "),
            "  }",
        ]
    if node.op == "conv":
        height, width, channels = shape
        rows, columns, outputs = node.shape
        (top, _), (left, _) = node.padding
        return [
            f"  for (int i = 0; i < {rows}; i++)",
            f"    for (int j = 0; j < {columns}; j++)",
            f"      for (int n = 0; n < {outputs}; n++) {{",
            f"        {total}",
            f"        for (int u = 0; u < {node.kernel[0]}; u++)",
            f"          for (int v = 0; v < {node.kernel[1]}; v++) {{",
            f"            const int r = i * {node.strides[0]} + u - {top}, s = j * {node.strides[1]} + v - {left};",
            f"            if (r < 0 || r >= {height} || s < 0 || s >= {width}) continue;",
            f"            for (int c = 0; c < {channels}; c++)",
            f"              sum += {source}[(r * {width} + s) * {channels} + c]",
            f"                  * {weight}[((u * {node.kernel[1]} + v) * {channels} + c) * {outputs} + n]);",
            "          }",
            *_store(node, f"(i * {columns} + j) * {outputs} + n", "n", "        "),
            "      }",
        ]
    if node.op == "scale":
        channels = shape[-1]
        return [
            f"  for (int i = 0; i < {size}; i++)",
            f"    {name}[i] = {name}_t({source}[i] * fixed_from_raw<{name}_a_t>({name}_a_raw[i % {channels}])"
            f"{_bias(node, f'i % {channels}')});",
        ]
    if node.op == "add":
        return [f"  for (int i = 0; i < {size}; i++) {name}[i] = {name}_t({source}[i] + {node.sources[1]}[i]);"]
    if node.op == "relu":
        return [
            f"  for (int i = 0; i < {size}; i++)",
            f"    if ({source}[i] > 0) {name}[i] = {source}[i]; else {name}[i] = 0;",
        ]
    _, width, channels = shape
    rows, columns, _ = node.shape
    return [
        f"  for (int i = 0; i < {rows}; i++)",
        f"    for (int j = 0; j < {columns}; j++)",
        f"      for (int c = 0; c < {channels}; c++) {{",
        f"        {name}_sum_t sum = 0;",
        f"        for (int u = 0; u < {node.kernel[0]}; u++)",
        f"          for (int v = 0; v < {node.kernel[1]}; v++)",
        f"            sum += {source}[((i * {node.kernel[0]} + u) * {width} + j * {node.kernel[1]} + v) * {channels}"
        " + c];",
        # The sum has as many more bits right of its point: this shift loses none.
        f"        sum = sum >> {_halvings(node)};",
        f"        {name}[(i * {columns} + j) * {channels} + c] = {name}_t(sum);",
        "      }",
    ]


def _header(spec: Spec, params: Mapping[str, Any], name: str) -> str:
    inputs, outputs = int(np.prod(spec.shape)), int(np.prod(spec.of(spec.last)[0]))
    lines = [
        f"// {name}: a network in fixed point; arrays are flat, the last axis of an image is its channels.",
        "#pragma once",
        '#include "ap_fixed.h"',
        '#include "ap_int.h"',
        "",
        _HELPERS,
        f"typedef {cpp_type(spec.fmt)} input_t;",
    ]
    for node in spec.nodes:
        lines += ["", *_declarations(spec, node, params.get(node.name, {}))]
    lines += ["", f"inline void {name}(const input_t input[{inputs}], {spec.last}_t output[{outputs}]) {{"]
    for node in spec.nodes:
        lines += [f"  {node.name}_t {node.name}[{int(np.prod(node.shape))}];", *_body(spec, node)]
    lines += [f"  for (int i = 0; i < {outputs}; i++) output[i] = {spec.last}[i];", "}"]
    return "\n".join(lines) + "\n"


def _testbench(spec: Spec, name: str, x: np.ndarray, y: np.ndarray) -> str:
    inputs, outputs = int(np.prod(spec.shape)), int(np.prod(spec.of(spec.last)[0]))
    return f"""\
// Runs {name} on {len(x)} inputs and compares raw outputs. Returns 1 if one bit differs.
#include <cstdio>
#include "{name}.h"

{_array("int", "tb_inputs", x)}
{_array("int", "tb_expected", y)}

int main() {{
  int wrong = 0;
  for (int t = 0; t < {len(x)}; t++) {{
    input_t input[{inputs}];
    {spec.last}_t output[{outputs}];
    for (int i = 0; i < {inputs}; i++) input[i] = fixed_from_raw<input_t>(tb_inputs[t * {inputs} + i]);
    {name}(input, output);
    for (int i = 0; i < {outputs}; i++) {{
      const long long got = fixed_to_raw(output[i]), expected = tb_expected[t * {outputs} + i];
      if (got == expected) continue;
      if (wrong++ < 10) std::printf("input %d, output %d: %lld, expected %lld\\n", t, i, got, expected);
    }}
  }}
  std::printf("%d of %d outputs differ\\n", wrong, {len(x) * outputs});
  return wrong != 0;
}}
"""


def export_hls(
    spec: Spec,
    params: Mapping[str, Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    inputs: Any,
    name: str = "network",
) -> tuple[pathlib.Path, pathlib.Path]:
    """Write ``name.h`` and ``name_tb.cpp`` into a folder.

    Args:
        spec: the network.
        params: raw integers, as `int_forward` takes them. Concrete.
        path: the folder; made if it is not there.
        inputs: raw inputs [B, *shape] for the testbench, at least one. Concrete.
        name: of the function and the files.

    Returns:
        The header and the testbench.

    Raises:
        ValueError: if there are no nodes or no inputs, shapes or formats do not fit, the mean of a window would need a
            divider, or ``name`` is none in C++ or that of a node.

    >>> import tempfile
    >>> f = FixedPoint(4, 2)
    >>> spec = Spec((2,), f).dense("fc", 1, w=f, out=f)
    >>> files = export_hls(spec, {"fc": {"w": np.array([[4], [2]])}}, tempfile.mkdtemp(), inputs=np.array([[1, 4]]))
    >>> [file.name for file in files]
    ['network.h', 'network_tb.cpp']
    """
    if not spec.nodes:
        raise ValueError("spec has no nodes, expected at least one")
    if not name.isidentifier() or not name.isascii() or name in {"input", "output", *(n.name for n in spec.nodes)}:
        raise ValueError(f"name is {name!r}, expected a name in C++ that no node has")
    x = np.asarray(inputs)
    if x.ndim != len(spec.shape) + 1 or not len(x):
        raise ValueError(f"inputs has shape {x.shape}, expected [B, {', '.join(map(str, spec.shape))}], B at least 1")
    check_raw("inputs", x, spec.fmt, (len(x), *spec.shape))
    check_params(spec, params)
    header = _header(spec, params, name)
    testbench = _testbench(spec, name, x, np.asarray(int_forward(spec, params, x)))
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / f"{name}.h", folder / f"{name}_tb.cpp"
    files[0].write_text(header)
    files[1].write_text(testbench)
    return files
