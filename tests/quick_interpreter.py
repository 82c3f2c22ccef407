"""Spares Triton's interpreter what it does anew each time, and what takes longer than the kernels of tests."""

import copy
import functools
import inspect
import types

# Operations that compute with what their tensors hold in calls of the interpreter's builder alone; which calls these
# are depends on the operands' types and on plain arguments. Not program_id, whose result differs between programs.
BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift")
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
OPERATIONS = frozenset(
    (
        *(f"__{name}__" for name in (*BINARY, *COMPARISONS, "neg", "invert", "not", "getitem")),
        *(f"__r{name}__" for name in (*BINARY, *COMPARISONS)),
        *("add", "sub", "mul", "fma", "minimum", "maximum", "clamp", "where", "logical_and", "logical_or", "dot"),
        *("abs", "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "floor", "ceil", "cast", "to"),
        *("full", "arange", "broadcast", "broadcast_to", "expand_dims", "reshape", "trans", "permute", "gather"),
        *("load", "store"),
    )
)


def make_interpreter_quick() -> None:
    """Versions of Triton whose interpreter is made otherwise are left as they are."""
    try:
        from triton.runtime import interpreter

        _patch_once_a_launch(interpreter)
        _note_operations(interpreter)
    except (ImportError, AttributeError):
        return


def _patch_once_a_launch(interpreter: types.ModuleType) -> None:
    """The interpreter puts functions of its own in place of those of triton.language, before it runs a kernel and again
    at each call of a function inside it. The second time changes nothing: here it is done once a launch."""
    put_in_place, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    languages = {interpreter.tl, interpreter.tl.core}
    of_module, done = {}, set()
    nothing_new = types.SimpleNamespace(restore=lambda: None)  # to restore: the launch sees to that

    @functools.wraps(put_in_place)
    def put_in_place_once(function):
        known = of_module.get(function.__module__)
        if known is None:
            named = [value for value in function.__globals__.values() if isinstance(value, type(functools))]
            known = of_module[function.__module__] = frozenset(languages.intersection(named))
        if known in done:
            return nothing_new
        done.add(known)
        return put_in_place(function)

    @functools.wraps(launch)
    def launch_anew(self, *args, **kwargs):
        done.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            done.clear()  # what was put in place is restored by now

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = put_in_place_once, launch_anew


def _note_operations(interpreter: types.ModuleType) -> None:
    """Operations work out their operands' common type and shape, convert and broadcast, check for overflow what nothing
    looks at, and make types by the dozen, before the builder computes with NumPy: ten times as long as that takes. All
    of it depends on types and plain arguments alone. So the first time the builder's calls are noted, and operations of
    the same types make the same calls: the same results, to the bit."""
    put_in_place = interpreter._patch_attr
    if [*inspect.signature(put_in_place).parameters] != ["obj", "name", "member", "builder", "scope"]:
        return
    of_member = {}

    @functools.wraps(put_in_place)
    def put_noted_in_place(obj, name, member, builder, scope):
        if name not in OPERATIONS:
            return put_in_place(obj, name, member, builder, scope)
        if member not in of_member:
            of_member[member] = _noted(member, interpreter)
        scope.set_attr(obj, name, of_member[member])

    interpreter._patch_attr = put_noted_in_place
    table = interpreter._get_np_dtype  # which makes a table of them at each call
    of_name = {}

    @functools.wraps(table)
    def dtype_of_name(dtype):
        if dtype.name not in of_name:
            of_name[dtype.name] = table(dtype)
        return of_name[dtype.name]

    interpreter._get_np_dtype = dtype_of_name


class Unknown(Exception):
    """An argument that no description is known of."""


def _noted(member, interpreter):
    """An operation of triton.language that remembers the builder's calls, by what its arguments are."""
    semantic, builder, tl = interpreter.interpreter_semantic, interpreter.interpreter_builder, interpreter.tl
    tensor, constexpr, dtype = tl.tensor, tl.constexpr, tl.dtype
    remembered = {}

    def describe(value):
        kind = type(value)
        if kind in (int, bool, str, type(None)):
            return kind, value
        if kind is float:
            return kind, repr(value)  # by which -0.0 is another than 0.0, and NaN the same as NaN
        if kind is constexpr:
            return kind, describe(value.value)
        if kind in (tuple, list, tl.tuple):
            return kind, *map(describe, value)
        if kind is slice:
            return kind, *map(describe, (value.start, value.stop, value.step))
        if isinstance(value, dtype):
            return dtype, value.name
        raise Unknown(kind)

    def operate(*args, **kwargs):
        return member(*args, **{**kwargs, "_semantic": semantic})

    def note(args, kwargs):
        handles = []

        def apart(value):  # for one tensor may be both operands now and need not be later
            if type(value) is tensor:
                value = copy.copy(value)
                value.handle = copy.copy(value.handle)
                handles.append(value.handle)
            return value

        args, kwargs = [apart(value) for value in args], {name: apart(value) for name, value in kwargs.items()}
        semantic.builder = notebook = Notebook(interpreter, handles)
        try:
            result = operate(*args, **kwargs)
        finally:
            semantic.builder = builder
        return result, notebook.calls_for(result) if type(result) is tensor else None

    def call(*args, **kwargs):  # no wrapper by name: it would pass for an operation that is yet to be put in place
        if semantic.builder is not builder:  # part of an operation that is being noted
            return operate(*args, **kwargs)
        handles, key = [], []
        try:
            for value in args:
                if type(value) is tensor:
                    key.append(value.type.name)
                    handles.append(value.handle)
                else:
                    key.append(describe(value))
            for name, value in kwargs.items():
                key.append(name)
                if type(value) is tensor:
                    key.append(value.type.name)
                    handles.append(value.handle)
                elif name != "_semantic":  # which is always the same
                    key.append(describe(value))
        except Unknown:
            return operate(*args, **kwargs)
        key = tuple(key)
        if key not in remembered:
            result, remembered[key] = note(args, kwargs)
            return result
        if remembered[key] is None:
            return operate(*args, **kwargs)
        constants, calls, at, attributes = remembered[key]
        values = handles + constants
        for function, operands in calls:
            values.append(function(*[values[i] for i in operands]))
        result = tensor.__new__(tensor)
        result.__dict__.update(attributes)
        result.handle = values[at]
        return result

    call.__wrapped__ = member
    return call


class Notebook:
    """In the place of the interpreter's builder: makes its calls and notes them. Values are numbered, first the handles
    of the operands, then whatever else calls are given and what they give."""

    def __init__(self, interpreter, handles):
        self.builder, self.handle = interpreter.interpreter_builder, interpreter.TensorHandle
        self.operands = len(handles)
        self.values = [*handles]
        self.number = {id(handle): i for i, handle in enumerate(handles)}
        self.calls = []  # a function, the numbers of its arguments, and that of what it gave

    def __getattr__(self, name):
        function = getattr(self.builder, name)
        if not callable(function):
            return function

        def call(*args):
            value = function(*args)
            if name.startswith("create_") or type(value) is self.handle:  # others give types
                numbers = [self.number[id(arg)] if type(arg) is self.handle else self.new(arg) for arg in args]
                self.number[id(value)] = self.new(value)
                self.calls.append((function, numbers, self.number[id(value)]))
            return value

        return call

    def new(self, value):
        self.values.append(value)
        return len(self.values) - 1

    def calls_for(self, result):
        """The constants and the calls that give the result, whose arguments are numbers of operands, constants and what
        calls gave, in this order; the number of the result, and its attributes. None where no call gave it."""
        goal = self.number.get(id(result.handle))
        if goal is None:
            return None
        varying = set(range(self.operands))
        for _, numbers, given in self.calls:
            if given == goal or varying.intersection(numbers):
                varying.add(given)
        wanted, calls = {goal}, []
        for call in reversed(self.calls):
            if call[2] in wanted & varying:
                calls.insert(0, call)
                wanted.update(call[1])
        constants = sorted(wanted - varying)
        order = [*range(self.operands), *constants, *(given for *_, given in calls)]
        place = {number: i for i, number in enumerate(order)}
        calls = [(function, [place[number] for number in numbers]) for function, numbers, _ in calls]
        attributes = {name: value for name, value in vars(result).items() if name != "handle"}
        return [self.values[number] for number in constants], calls, place[goal], attributes
