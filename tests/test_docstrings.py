"""What public docstrings tell, in numpydoc's sections: parameters, results, errors, an example.

Which errors a function can raise is read from its source, and from that of all functions of gpuroi
that it calls by name; what a backend or another object raises is not seen.
"""

import ast
import builtins
import dataclasses
import doctest
import importlib
import inspect
import re
import textwrap

import pytest

import gpuroi
import gpuroi.testing
from gpuroi import arrays, errors

MODULES = [gpuroi] + [
    importlib.import_module(f"gpuroi.{name}")
    for name in (
        "arrays",
        "backends",
        "cohort",
        "datasets",
        "image",
        "plotting",
        "regions",
        "report",
        "stack",
        "testing",
    )
]

#: Errors that the source can raise, and these callers cannot make it raise.
UNREACHABLE = {
    ("Regions.files", ValueError),  # 2**31 regions in a volume
    ("write_report", TypeError),  # of what is no path
    ("Report.add", ValueError),  # of a colour map that is never given
}

HEADING = re.compile(r"^(\w[\w ]*)\n-{3,}\n", re.MULTILINE)


def public_names(module):
    """Return `__all__`, or what a module that has none defines."""
    defined = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return getattr(module, "__all__", defined)


def public_objects():
    """Return public functions, classes and the methods these define, by their names."""
    names = {}
    for module in MODULES:
        for name in public_names(module):
            value = getattr(module, name)
            if inspect.isclass(value):
                names.setdefault(value, f"{module.__name__}.{name}")
                for method_name, method in vars(value).items():
                    is_public = not method_name.startswith(("_", "test_"))
                    if inspect.isfunction(method) and is_public:
                        names.setdefault(method, f"{names[value]}.{method_name}")
            elif inspect.isfunction(inspect.unwrap(value)):
                names.setdefault(value, f"{module.__name__}.{name}")
    return {name: value for value, name in names.items()}


def sections(documented):
    """Return the parts of a docstring by their headings."""
    parts = HEADING.split(inspect.cleandoc(documented.__doc__ or ""))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def told(section):
    """Return the names at the left of a section's entries; ``a, b : type`` are two."""
    entries = [line for line in section.splitlines() if line and not line.startswith(" ")]
    return [name for entry in entries for name in entry.partition(" : ")[0].split(", ")]


class Errors(ast.NodeVisitor):
    """The classes of errors that a function can raise, those that it catches left out."""

    def __init__(self, function, seen=None):
        self.found = set()
        self._seen = {function} if seen is None else seen
        self._names = dict(function.__globals__)
        self._caught = ()
        self.visit(ast.parse(textwrap.dedent(inspect.getsource(function))))

    def visit_ImportFrom(self, node):
        if node.module.split(".")[0] == "gpuroi":
            for alias in node.names:
                module = importlib.import_module(node.module)
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                self._names[alias.asname or alias.name] = getattr(module, alias.name)

    def visit_Try(self, node):
        before = self._caught
        for handler in node.handlers:
            types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
            self._caught += tuple(filter(inspect.isclass, map(self._value, types)))
        for statement in node.body:
            self.visit(statement)
        self._caught = before
        for statement in (*node.handlers, *node.orelse, *node.finalbody):
            self.visit(statement)

    def visit_Raise(self, node):
        raised = self._value(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)
        if inspect.isclass(raised):
            self._add({raised})
        self.generic_visit(node)

    def visit_Call(self, node):
        self.generic_visit(node)
        called = self._value(node.func)
        if inspect.isclass(called):
            called = called.__init__
        called = inspect.unwrap(getattr(called, "__func__", called))
        if (
            inspect.isfunction(called)
            and called.__module__.startswith("gpuroi.")
            and called.__code__.co_filename.endswith(".py")  # not what dataclasses write
            and called not in self._seen
        ):
            self._seen.add(called)
            self._add(Errors(called, self._seen).found)

    def _value(self, node):
        """Return what an expression names: a global, a builtin, or an attribute of one."""
        if isinstance(node, ast.Name):
            return self._names.get(node.id, getattr(builtins, node.id, None))
        if isinstance(node, ast.Attribute):
            owner = self._value(node.value)
            if inspect.ismodule(owner) or inspect.isclass(owner):
                return getattr(owner, node.attr, None)
        return None

    def _add(self, classes):
        self.found |= {
            one
            for one in classes
            if one.__module__ in ("builtins", errors.__name__) and not issubclass(one, self._caught)
        }


def is_told(error, names):
    """Return whether an error, or a base that says more than "an error", is among `names`."""
    vague = (errors.GpuroiError, Exception, BaseException, object)
    return any(base.__name__ in names for base in error.__mro__ if base not in vague)


def gaps(documented):
    """Return what the docstring of a function or class lacks."""
    parts = sections(documented)
    if inspect.isclass(documented):
        if not dataclasses.is_dataclass(documented):
            return
        attributes = told(parts.get("Attributes", ""))
        for field in dataclasses.fields(documented):
            if not field.name.startswith("_") and field.name not in attributes:
                yield f"attribute {field.name}"
        return
    function = inspect.unwrap(documented)
    signature = inspect.signature(function)
    parameters = [name.lstrip("*") for name in told(parts.get("Parameters", ""))]
    expected = [name for name in signature.parameters if name != "self"]
    if sorted(parameters) != sorted(expected):
        yield f"parameters {expected}, told are {parameters}"
    returns_something = signature.return_annotation not in (None, "None")
    if returns_something != ("Returns" in parts):
        yield "Returns" if returns_something else "no Returns"
    raises = told(parts.get("Raises", ""))
    for error in sorted(Errors(function).found, key=lambda error: error.__name__):
        if not is_told(error, raises) and (function.__qualname__, error) not in UNREACHABLE:
            yield f"Raises {error.__name__}"
    is_method = "." in function.__qualname__
    if not is_method and not doctest.DocTestParser().get_examples(function.__doc__):
        yield "Examples"


OBJECTS = public_objects()


@pytest.mark.parametrize("name", sorted(OBJECTS))
def test_docstrings_tell_parameters_results_errors_and_an_example(name):
    assert list(gaps(OBJECTS[name])) == []


def with_gaps(volume, *, percentile) -> float:
    """Return a cut-off.

    Parameters
    ----------
    volume, unit : array

    Raises
    ------
    GpuroiError
        If it is no array.
    """
    if not percentile:
        raise KeyError(percentile)
    try:
        raise IndexError
    except LookupError:
        return arrays.percentile_cutoff(volume, percentile)


def test_gaps_are_found():
    assert list(gaps(with_gaps)) == [
        "parameters ['volume', 'percentile'], told are ['volume', 'unit']",
        "Returns",
        "Raises BackendUnavailableError",
        "Raises KeyError",
        "Raises TypeError",
        "Raises UnknownBackendError",
        "Raises ValueError",
        "Examples",
    ]


def test_examples_of_the_suite_for_backends_run():
    results = doctest.testmod(gpuroi.testing)
    assert results.attempted > 0
    assert results.failed == 0
