"""The scan as standard ONNX operators: `torch.ops.vim2.selective_scan` for torch.onnx's exporter.

Its recurrence (see `vim2.ops.selective_scan`) is a `Scan` over all directions, batch and states at once, in one of two
forms (docs/export.md says what they cost). By steps, one after the other, what a step works on stays in a processor's
cache. By chunks of a few steps, scanned side by side, O(log L) large operators are started one after the other, as
suits GPUs:

1. every chunk is scanned from zero, to its last state, and its decays are multiplied;
2. chunks are joined in log2(chunks) doublings (Hillis and Steele 1986), which gives the states at their starts;
3. every chunk is scanned once more, from there.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from onnxscript import BFLOAT16, DOUBLE, FLOAT, FLOAT16, INT64, graph, ir, script
from onnxscript import opset18 as op

from ..ops.scan.orders import ORDERS

__all__ = ["selective_scan", "sort"]

TFloat = TypeVar("TFloat", BFLOAT16, DOUBLE, FLOAT, FLOAT16)

# From so many channels on they are the states' last axis; below, the batch is. Runtimes multiply with broadcasting a
# run of the last axis at a time, and the channel mixers have but 16 channels, with a batch of all tokens.
WIDE = 64

CHUNK = 16  # steps of a chunk
# Up to this length, where it is known, a scan of chunks would start more operators than one of steps.
MAX_UNSPLIT_LENGTH = 2 * CHUNK
_MAX_DOUBLINGS = 31


def _scans(kind):
    """The two layouts, the last states of either, and the states at the starts of chunks, for steps of one type, FLOAT
    or DOUBLE: ONNX leaves the types of a step's inputs open, and OpenVINO wants to know them.

    The first is from states (K, batch, N, E); dt and x (L, K, batch, 1, E), B (L, K, batch, N, 1), C (L, K, batch, 1,
    N), A (K, 1, N, E), and gives (L, K, batch, 1, E). The second is from states (K, N, E, batch); dt and x (L, K, 1, E,
    batch), B and C (L, K, N, 1, batch), A (K, N, E, 1), and gives (L, K, 1, E, batch). Chunks are one more axis, the
    first of states and the second of what is scanned.
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
            states = op.Constant(value_ints=[-3])
            y_t = op.ReduceSum(C_t * h_next, states)
            return h_next, y_t

        _last, y = op.Scan(start, dt, x, B, C, body=step, num_scan_inputs=4)
        return y

    @script(default_opset=op)
    def last_states(start, dt, x, B, A) -> FLOAT:
        @graph()
        def step(h: any_shape, dt_t: any_shape, x_t: any_shape, B_t: any_shape):
            h_next = op.Exp(dt_t * A) * h + x_t * B_t
            return h_next

        last = op.Scan(start, dt, x, B, body=step, num_scan_inputs=3)
        return last

    @script(default_opset=op)
    def join(ends, decay, before) -> FLOAT:
        """ends: each chunk's last state from zero; decay: the product of its decays, zero for the first; before:
        (doublings, chunks), the chunks 1, 2, 4, ... before each, or the first. The last states from the first chunk's
        start on."""

        @graph()
        def double(h: any_shape, decay_h: any_shape, before_i: INT64[...]):
            # Where there is no chunk so far before one, its decays are zero by now. (An infinite state becomes NaN.)
            h_next = decay_h * op.Gather(h, before_i, axis=0) + h
            decay_next = decay_h * op.Gather(decay_h, before_i, axis=0)
            return h_next, decay_next

        joined, _decay = op.Scan(ends, decay, before, body=double, num_scan_inputs=1)
        return joined

    return scan_wide, scan_narrow, last_states, join


_SCANS = {ir.DataType.FLOAT: _scans(FLOAT), ir.DataType.DOUBLE: _scans(DOUBLE)}


def selective_scan(chunked: bool) -> Callable:
    """The translation by chunks or by steps.

    Traced by the exporter, with the arguments and results of the registered operator, see `vim2.ops.scan.operator`.
    States and decays are float32, float64 where any input is. Of the results only y is computed. It raises
    NotImplementedError if the last states are wanted.
    """

    def translated(
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
        if with_last:
            raise NotImplementedError("An exported scan does not return its last state.")
        operands = u, delta, A, B, C, D, delta_bias, delta_weight
        return _translate(chunked, operands, delta_softplus, orders, height, width, merge)

    return translated


def _translate(chunked: bool, operands, delta_softplus: bool, orders: Sequence[int], height, width, merge: bool):
    u, delta, A, B, C, D, delta_bias, delta_weight = operands
    result = u.dtype
    directions, features, states = A.shape  # known, as those of other parameters are; sizes of maps are not
    rank = delta.shape[-1]
    is_shared, is_low_rank, is_wide = len(u.shape) == 3, len(delta_weight.shape) == 3, features >= WIDE
    is_double = ir.DataType.DOUBLE in (u.dtype, delta.dtype, A.dtype, B.dtype, C.dtype)
    dtype = ir.DataType.DOUBLE if is_double else ir.DataType.FLOAT
    u, delta, A, B, C, D, delta_bias, delta_weight = (t if t.dtype == dtype else op.Cast(t, to=dtype) for t in operands)
    batch = op.Shape(delta, start=0, end=1)
    length = op.Mul(height, width)
    direction = _ints(*range(directions))
    if isinstance(height, int) and isinstance(width, int) and height * width <= MAX_UNSPLIT_LENGTH:
        chunked = False
    if chunked:
        # All chunks' first steps come first, and the last chunk is filled up with its last step.
        chunks = op.Div(op.Add(length, CHUNK - 1), CHUNK)
        row = op.Range(0, op.Mul(chunks, CHUNK), 1)
        steps = op.Add(op.Mul(op.Mod(row, chunks), CHUNK), op.Div(row, chunks))
        is_step = op.Cast(op.Less(steps, length), to=dtype)
        steps = op.Min(steps, op.Sub(length, 1))
    else:
        steps = op.Range(0, length, 1)

    # The batch goes from the first axis to just before or behind the channels, (L, K, batch, X) or (L, K, X, batch),
    # the one axis alone, which runtimes have a fast form for.
    to_steps = [1, 2, 0, 3] if is_wide else [1, 2, 3, 0]
    from_steps = [2, 0, 1, 3] if is_wide else [3, 0, 1, 2]
    positions = _visits(orders, steps, height, width, length)
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
    if chunked:  # a step of size zero changes no state
        dt = op.Mul(dt, op.Unsqueeze(is_step, _ints(1, 2, 3)))
    if is_shared:
        inputs = op.Gather(op.Transpose(u, perm=[1, 0, 2] if is_wide else [1, 2, 0]), positions, axis=0)
    else:
        inputs = walk(u)
    x = op.Mul(dt, inputs)
    A = op.Transpose(A, perm=[0, 2, 1])
    scan_wide, scan_narrow, last_states, join = _SCANS[dtype]
    zero = _number(0.0, dtype)
    if is_wide:
        of_states = op.Concat(_ints(directions), batch, _ints(states, features), axis=0)
        fields = *_unsqueeze((dt, 3), (x, 3), (walk(B), 4), (walk(C), 3)), op.Unsqueeze(A, _ints(1))
        scan, row_axis = scan_wide, 3
    else:
        of_states = op.Concat(_ints(directions, states, features), batch, axis=0)
        fields = *_unsqueeze((dt, 2), (x, 2), (walk(B), 3), (walk(C), 3)), op.Unsqueeze(A, _ints(3))
        scan, row_axis = scan_narrow, 2
    if chunked:
        dt, x, B, C = (_split(t) for t in fields[:4])
        A = fields[4]
        of_states = op.Concat(op.Reshape(chunks, _ints(1)), of_states, axis=0)
        numbers = op.Range(0, chunks, 1)
        has_earlier = op.Unsqueeze(op.Greater(numbers, 0), _ints(1, 2, 3, 4))
        ends = last_states(op.Expand(zero, of_states), dt, x, B, A)
        decay = op.Exp(op.Mul(op.ReduceSum(dt, _ints(0), keepdims=0), A))
        ends = join(ends, op.Where(has_earlier, decay, zero), _before(numbers, chunks))
        start = op.Where(has_earlier, op.Gather(ends, op.Max(op.Sub(numbers, 1), 0), axis=0), zero)
        y = _join(scan(start, dt, x, B, C, A))
    else:
        y = scan(op.Expand(zero, of_states), *fields)
    y = op.Squeeze(y, _ints(row_axis))

    # a map's walk over columns is undone by that of the transposed map
    at = _visits(orders, op.Range(0, length, 1), width, height, length)
    if chunked:
        at = op.Add(op.Mul(op.Mod(at, CHUNK), chunks), op.Div(at, CHUNK))
    y = op.Gather(_join(y), op.Add(op.Mul(at, directions), direction), axis=0)
    y = op.Transpose(y, perm=from_steps)
    y = op.Add(y, op.Mul(op.Unsqueeze(u, _ints(2)) if is_shared else u, D))
    if merge:
        y = op.ReduceSum(y, _ints(2), keepdims=0)
    nothing = op.Expand(zero, _ints(0))
    return y if result == dtype else op.Cast(y, to=result), nothing, nothing


def _visits(orders: Sequence[int], steps, height, width, length):
    """(steps, K): the position that each direction's walk visits at each step, see `vim2.ops.scan.orders`."""
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


def _before(numbers, chunks):
    """(doublings, chunks): the chunk that is 1, 2, 4, ... before each, or the first, for distances below the number of
    chunks."""
    distances = _ints(*(1 << i for i in range(_MAX_DOUBLINGS)))
    doublings = op.ReduceSum(op.Cast(op.Greater(chunks, distances), to=ir.DataType.INT64))
    distances = op.Slice(distances, _ints(0), op.Max(doublings, _ints(1)))
    return op.Max(op.Sub(numbers, op.Unsqueeze(distances, _ints(1))), 0)


def _split(t):
    """(L, ...) -> (CHUNK, L / CHUNK, ...)"""
    return op.Reshape(t, op.Concat(_ints(CHUNK, -1), op.Shape(t, start=1), axis=0))


def _unsqueeze(*axes):
    return (op.Unsqueeze(t, _ints(axis)) for t, axis in axes)


def sort(x: TFloat, stable: bool | None = None, dim: int = -1, descending: bool = False):
    """`aten.sort.stable`: the values, and where they were, of which that of equal ones may be another."""
    size = op.Shape(x, start=dim, end=None if dim == -1 else dim + 1)
    return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)
