"""The scan as standard ONNX operators: `torch.ops.vim2.selective_scan` for torch.onnx's exporter.

Its recurrence (see `vim2.ops.selective_scan`) is a `Scan` of one step at a time, over all directions, batch and states
at once. Of the forms that were timed in onnxruntime (docs/export.md) it is the fastest: what a step works on stays in
the cache, where chunks that are scanned side by side, or a scan in O(log L) steps, read and write all states from
memory several times.
"""

from collections.abc import Sequence
from typing import TypeVar

from onnxscript import BFLOAT16, DOUBLE, FLOAT, FLOAT16, INT64, graph, ir, script
from onnxscript import opset18 as op

from ..ops.scan.orders import ORDERS

__all__ = ["selective_scan", "sort"]

TFloat = TypeVar("TFloat", BFLOAT16, DOUBLE, FLOAT, FLOAT16)

# From so many channels on they are the states' last axis; below, the batch is. Runtimes multiply with broadcasting a
# run of the last axis at a time, and the channel mixers have but 16 channels, with a batch of all tokens.
WIDE = 64


def _scans(kind):
    """The two layouts, for steps of one type, FLOAT or DOUBLE: ONNX leaves the types of a step's inputs open, and
    OpenVINO wants to know them.

    The first is from states (K, batch, N, E); dt and x (L, K, batch, 1, E), B (L, K, batch, N, 1), C (L, K, batch, 1,
    N), A (K, 1, N, E), and gives (L, K, batch, 1, E). The second is from states (K, N, E, batch); dt and x (L, K, 1, E,
    batch), B and C (L, K, N, 1, batch), A (K, N, E, 1), and gives (L, K, 1, E, batch).
    """
    any_shape = kind[...]

    @script(default_opset=op)
    def scan_wide(start, dt, x, B, C, A) -> FLOAT:
        @graph()
        def step(h: any_shape, dt_t: any_shape, x_t: any_shape, B_t: any_shape, C_t: any_shape):
            h_next = op.Exp(dt_t * A) * h + x_t * B_t
            y_t = op.MatMul(C_t, h_next)
            return h_next, y_t

        _last, y = op.Scan(start, dt, x, B, C, body=step, num_scan_inputs=4)
        return y

    @script(default_opset=op)
    def scan_narrow(start, dt, x, B, C, A) -> FLOAT:
        @graph()
        def step(h: any_shape, dt_t: any_shape, x_t: any_shape, B_t: any_shape, C_t: any_shape):
            h_next = op.Exp(dt_t * A) * h + x_t * B_t
            states = op.Constant(value_ints=[1])
            y_t = op.ReduceSum(C_t * h_next, states)
            return h_next, y_t

        _last, y = op.Scan(start, dt, x, B, C, body=step, num_scan_inputs=4)
        return y

    return scan_wide, scan_narrow


_SCANS = {ir.DataType.FLOAT: _scans(FLOAT), ir.DataType.DOUBLE: _scans(DOUBLE)}


def selective_scan(
    u: TFloat,
    delta: TFloat,
    A: TFloat,
    B: TFloat,
    C: TFloat,
    D: TFloat,
    delta_bias: TFloat,
    delta_weight: TFloat,
    delta_softplus: bool,
    orders: Sequence[int],
    height: INT64,
    width: INT64,
    merge: bool,
    with_last: bool,
    chunk: INT64,
    backend: str,
):
    """Traced by the exporter, with the arguments and results of the registered operator, see `vim2.ops.scan.operator`.

    States and decays are float32, float64 where any input is. Of the results only y is computed.

    Raises:
        NotImplementedError: The last states are wanted.
    """
    if with_last:
        raise NotImplementedError("An exported scan does not return its last state.")
    result = u.dtype
    directions, features, states = A.shape  # known, as those of other parameters are; sizes of maps are not
    rank = delta.shape[-1]
    is_shared, is_low_rank, is_wide = len(u.shape) == 3, len(delta_weight.shape) == 3, features >= WIDE
    is_double = ir.DataType.DOUBLE in (u.dtype, delta.dtype, A.dtype, B.dtype, C.dtype)
    dtype = ir.DataType.DOUBLE if is_double else ir.DataType.FLOAT
    u, delta, A, B, C, D, delta_bias, delta_weight = (
        t if t.dtype == dtype else op.Cast(t, to=dtype) for t in (u, delta, A, B, C, D, delta_bias, delta_weight)
    )
    batch = op.Shape(delta, start=0, end=1)
    length = op.Mul(height, width)
    direction = _ints(*range(directions))

    # The batch goes from the first axis to just before or behind the channels, (L, K, batch, X) or (L, K, X, batch),
    # the one axis alone, which runtimes have a fast form for.
    to_steps = [1, 2, 0, 3] if is_wide else [1, 2, 3, 0]
    from_steps = [2, 0, 1, 3] if is_wide else [3, 0, 1, 2]
    positions = _visits(orders, height, width, length)
    rows = op.Add(op.Mul(positions, directions), direction)  # of a step's position and direction, in (L K, ...)

    def walk(t):
        """(batch, L, K, X) in memory's order to one of steps."""
        return op.Gather(_join(op.Transpose(t, perm=to_steps)), rows, axis=0)

    if is_low_rank and is_wide:  # one product for each direction, where (L, K, batch, R) would take many small ones
        factors = op.Reshape(op.Transpose(delta, perm=[2, 1, 0, 3]), _ints(directions, -1, rank))
        dt = op.MatMul(factors, op.Transpose(delta_weight, perm=[0, 2, 1]))
        dt = op.Reshape(dt, op.Concat(_ints(-1), batch, _ints(features), axis=0))  # (K L, batch, E)
        dt = op.Gather(dt, op.Add(positions, op.Mul(length, direction)), axis=0)
    elif is_low_rank:
        dt = op.MatMul(delta_weight, walk(delta))
    else:
        dt = walk(delta)
    dt = op.Add(dt, op.Unsqueeze(delta_bias, _ints(1 if is_wide else 2)))
    if delta_softplus:
        dt = _softplus(dt, dtype)
    if is_shared:
        inputs = op.Gather(op.Transpose(u, perm=[1, 0, 2] if is_wide else [1, 2, 0]), positions, axis=0)
    else:
        inputs = walk(u)
    x = op.Mul(dt, inputs)
    A = op.Transpose(A, perm=[0, 2, 1])
    scan_wide, scan_narrow = _SCANS[dtype]
    zero = _number(0.0, dtype)
    if is_wide:
        start = op.Expand(zero, op.Concat(_ints(directions), batch, _ints(states, features), axis=0))
        dt, x, B, C = _unsqueeze((dt, 3), (x, 3), (walk(B), 4), (walk(C), 3))
        y = op.Squeeze(scan_wide(start, dt, x, B, C, op.Unsqueeze(A, _ints(1))), _ints(3))
    else:
        start = op.Expand(zero, op.Concat(_ints(directions, states, features), batch, axis=0))
        dt, x, B, C = _unsqueeze((dt, 2), (x, 2), (walk(B), 3), (walk(C), 3))
        y = op.Squeeze(scan_narrow(start, dt, x, B, C, op.Unsqueeze(A, _ints(3))), _ints(2))

    # a map's walk over columns is undone by that of the transposed map
    steps = _visits(orders, width, height, length)
    y = op.Gather(_join(y), op.Add(op.Mul(steps, directions), direction), axis=0)
    y = op.Transpose(y, perm=from_steps)
    y = op.Add(y, op.Mul(op.Unsqueeze(u, _ints(2)) if is_shared else u, D))
    if merge:
        y = op.ReduceSum(y, _ints(2), keepdims=0)
    nothing = op.Expand(zero, _ints(0))
    return y if result == dtype else op.Cast(y, to=result), nothing, nothing


def _visits(orders: Sequence[int], height, width, length):
    """(L, K): the position that each direction's walk visits at each step, see `vim2.ops.scan.orders`."""
    steps = op.Range(0, length, 1)
    walks = []
    for order in (ORDERS[i] for i in orders):
        positions = steps
        if order.startswith("columns"):
            positions = op.Add(op.Mul(op.Mod(steps, height), width), op.Div(steps, height))
        if order.endswith("backward"):
            positions = op.Sub(op.Sub(length, 1), positions)
        walks.append(op.Unsqueeze(positions, _ints(1)))
    return op.Concat(*walks, axis=1)


def _softplus(z, dtype):
    """As PyTorch's with its threshold of 20, in a third of the time that onnxruntime's own takes. What rounding takes
    from 1 + exp(z), which for a small step size is most of it, is added again."""
    one, threshold = _number(1.0, dtype), _number(20.0, dtype)
    e = op.Exp(op.Min(z, threshold))
    w = op.Add(e, one)
    lost = op.Sub(e, op.Sub(w, one))
    return op.Max(z, op.Add(op.Log(w), op.Div(lost, w)))


def _number(value: float, dtype: ir.DataType):
    return op.Cast(op.Constant(value_float=value), to=dtype)


def _ints(*values: int):
    return op.Constant(value_ints=values)


def _join(t):
    """The first two axes as one."""
    return op.Reshape(t, op.Concat(_ints(-1), op.Shape(t, start=2), axis=0))


def _unsqueeze(*axes):
    return (op.Unsqueeze(t, _ints(axis)) for t, axis in axes)


def sort(x: TFloat, stable: bool | None = None, dim: int = -1, descending: bool = False):
    """`aten.sort.stable`: the values, and where they were, of which that of equal ones may be another."""
    size = op.Shape(x, start=dim, end=None if dim == -1 else dim + 1)
    return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)
