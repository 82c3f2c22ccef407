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
    """The operator's results: y, and nothing in place of the last and the kept states."""
    u, delta, A, B, C, _, _, delta_weight = operands
    # Sizes of parameters are known, unlike those of maps, and ranks are; both are asked of operands, not of casts.
    _, features, states = A.shape
    rank = delta_weight.shape[2] if len(delta_weight.shape) == 3 else None
    is_shared = len(u.shape) == 3
    is_double = ir.DataType.DOUBLE in (u.dtype, delta.dtype, A.dtype, B.dtype, C.dtype)
    dtype, result = ir.DataType.DOUBLE if is_double else ir.DataType.FLOAT, u.dtype
    u, delta, A, B, C, D, delta_bias, delta_weight = (t if t.dtype == dtype else op.Cast(t, to=dtype) for t in operands)
    if isinstance(height, int) and isinstance(width, int) and height * width <= MAX_UNSPLIT_LENGTH:
        chunked = False
    walks = _Walks(orders, height, width, op.Shape(delta, start=0, end=1), features, chunked, dtype)

    dt = walks.to_steps(delta) if rank is None else _low_rank_product(walks, delta, delta_weight, rank)
    dt = op.Add(dt, op.Unsqueeze(delta_bias, _ints(1 if walks.is_wide else 2)))
    if delta_softplus:
        dt = _softplus(dt, dtype)
    if chunked:  # a step of size zero changes no state
        dt = op.Mul(dt, op.Unsqueeze(walks.is_step, _ints(1, 2, 3)))
    x = op.Mul(dt, walks.to_steps_of_each(u) if is_shared else walks.to_steps(u))
    y = _scan(walks, dt, x, walks.to_steps(B), walks.to_steps(C), A, states)
    y = walks.to_positions(y)
    y = op.Add(y, op.Mul(op.Unsqueeze(u, _ints(2)) if is_shared else u, D))
    if merge:
        y = op.ReduceSum(y, _ints(2), keepdims=0)
    nothing = op.Expand(_number(0.0, dtype), _ints(0))
    return y if result == dtype else op.Cast(y, to=result), nothing, nothing


class _Walks:
    """The walks of all directions, which bring (batch, L, K, X), in memory's order, into the order of steps, and back.

    Steps are (steps, K, batch, X) where there are many channels, `is_wide`, and (steps, K, X, batch) elsewhere: either
    way the batch alone is moved, for which runtimes have a fast form. In chunks, all chunks' first steps come first,
    then all second steps, and so on, and the last chunk is filled up with its last step.

    Args:
        orders: Indices into ORDERS, one a direction.
        height, width: Of the maps, numbers or values of the graph.
        batch: A value of the graph, (1,).
        features: Channels E.
        is_chunked: Whether steps come in chunks.
        dtype: The arithmetic's.

    Attributes:
        positions: (steps, K), the position that each walk visits at each step.
        chunks: The number of chunks, where there are some.
        is_step: (steps,), zeros where a chunk was filled up, where there are chunks.
    """

    def __init__(self, orders: Sequence[int], height, width, batch, features: int, is_chunked: bool, dtype):
        self.orders, self.height, self.width, self.batch, self.features = orders, height, width, batch, features
        self.is_wide, self.is_chunked, self.dtype = features >= WIDE, is_chunked, dtype
        self.directions = len(orders)
        self.length = op.Mul(height, width)
        if is_chunked:
            self.chunks = op.Div(op.Add(self.length, CHUNK - 1), CHUNK)
            row = op.Range(0, op.Mul(self.chunks, CHUNK), 1)
            steps = op.Add(op.Mul(op.Mod(row, self.chunks), CHUNK), op.Div(row, self.chunks))
            self.is_step = op.Cast(op.Less(steps, self.length), to=dtype)
            steps = op.Min(steps, op.Sub(self.length, 1))
        else:
            steps = op.Range(0, self.length, 1)
        self.positions = _visits(orders, steps, height, width, self.length)
        # of a step's position and direction, in (L K, ...)
        self.rows = op.Add(op.Mul(self.positions, self.directions), _ints(*range(self.directions)))

    def to_steps(self, t):
        """(batch, L, K, X) to the order of steps."""
        t = op.Transpose(t, perm=[1, 2, 0, 3] if self.is_wide else [1, 2, 3, 0])
        return op.Gather(_join(t), self.rows, axis=0)

    def to_steps_of_each(self, t):
        """(batch, L, X), which all directions share, to the order of each direction's steps."""
        return op.Gather(op.Transpose(t, perm=[1, 0, 2] if self.is_wide else [1, 2, 0]), self.positions, axis=0)

    def to_positions(self, y):
        """The order of steps to (batch, L, K, X)."""
        # a map's walk over columns is undone by that of the transposed map
        at = _visits(self.orders, op.Range(0, self.length, 1), self.width, self.height, self.length)
        if self.is_chunked:
            at = op.Add(op.Mul(op.Mod(at, CHUNK), self.chunks), op.Div(at, CHUNK))
        y = op.Gather(_join(y), op.Add(op.Mul(at, self.directions), _ints(*range(self.directions))), axis=0)
        return op.Transpose(y, perm=[2, 0, 1, 3] if self.is_wide else [3, 0, 1, 2])


def _low_rank_product(walks: _Walks, delta, delta_weight, rank: int):
    """The step sizes, in the order of steps, from their factor (batch, L, K, R) and its weight (K, E, R)."""
    if not walks.is_wide:
        return op.MatMul(delta_weight, walks.to_steps(delta))
    # one product for each direction, where (L, K, batch, R) would take many small ones
    directions, features = walks.directions, walks.features
    factors = op.Reshape(op.Transpose(delta, perm=[2, 1, 0, 3]), _ints(directions, -1, rank))
    dt = op.MatMul(factors, op.Transpose(delta_weight, perm=[0, 2, 1]))
    dt = op.Reshape(dt, op.Concat(_ints(-1), walks.batch, _ints(features), axis=0))  # (K L, batch, E)
    return op.Gather(dt, op.Add(walks.positions, op.Mul(walks.length, _ints(*range(directions)))), axis=0)


def _scan(walks: _Walks, dt, x, B, C, A, states: int):
    """y of the recurrence for the step sizes dt, the inputs x, which are dt u, and B and C, all in the order of steps.
    A is (K, E, N)."""
    directions, features = walks.directions, walks.features
    A = op.Transpose(A, perm=[0, 2, 1])
    zero = _number(0.0, walks.dtype)
    scan_wide, scan_narrow, last_states, join = _SCANS[walks.dtype]
    if walks.is_wide:
        of_states = op.Concat(_ints(directions), walks.batch, _ints(states, features), axis=0)
        fields, A = _unsqueeze((dt, 3), (x, 3), (B, 4), (C, 3)), op.Unsqueeze(A, _ints(1))
        scan, row_axis = scan_wide, 3
    else:
        of_states = op.Concat(_ints(directions, states, features), walks.batch, axis=0)
        fields, A = _unsqueeze((dt, 2), (x, 2), (B, 3), (C, 3)), op.Unsqueeze(A, _ints(3))
        scan, row_axis = scan_narrow, 2
    if not walks.is_chunked:
        return op.Squeeze(scan(op.Expand(zero, of_states), *fields, A), _ints(row_axis))
    dt, x, B, C = map(_split, fields)
    of_states = op.Concat(op.Reshape(walks.chunks, _ints(1)), of_states, axis=0)
    numbers = op.Range(0, walks.chunks, 1)
    has_earlier = op.Unsqueeze(op.Greater(numbers, 0), _ints(1, 2, 3, 4))
    ends = last_states(op.Expand(zero, of_states), dt, x, B, A)
    decay = op.Exp(op.Mul(op.ReduceSum(dt, _ints(0), keepdims=0), A))
    ends = join(ends, op.Where(has_earlier, decay, zero), _before(numbers, walks.chunks))
    start = op.Where(has_earlier, op.Gather(ends, op.Max(op.Sub(numbers, 1), 0), axis=0), zero)
    return op.Squeeze(_join(scan(start, dt, x, B, C, A)), _ints(row_axis))


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
