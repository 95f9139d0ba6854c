from __future__ import annotations

import gc
import importlib
import pkgutil
from collections import Counter

from numba.core.registry import CPUDispatcher

from pinaivu_node.engine import kernels


def test_no_two_compiled_functions_go_by_one_name():
    """Two of one name and type, each from another process's cache, and one runs for the other."""
    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{module.name}")
    functions = {
        id(each.py_func): each.py_func
        for each in gc.get_objects()
        if type(each) is CPUDispatcher and each.py_func.__module__.startswith(kernels.__name__)
    }
    assert len(functions) > 40
    names = Counter(f"{each.__module__}.{each.__qualname__}" for each in functions.values())
    assert [name for name, count in names.items() if count > 1] == []
