"""Spares Triton's interpreter what it does anew each time, and what takes longer than the kernels of tests."""

import functools
import types


def make_interpreter_quick() -> None:
    """The interpreter puts functions of its own in place of those of triton.language, before it runs a kernel and again
    at each call of a function inside it. The second time changes nothing: here it is done once a launch. Versions of
    Triton whose interpreter is made otherwise are left as they are."""
    try:
        from triton.runtime import interpreter

        put_in_place, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
        languages = {interpreter.tl, interpreter.tl.core}
    except (ImportError, AttributeError):
        return
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
