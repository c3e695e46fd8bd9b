"""What a function does, known by its code: a fingerprint of its syntax tree that every Python from 3.10 on agrees about.

A function is first taken out of the decorators of transformers that only rename keywords or checkpoint (``unwrap``). What is left is
compared with known forms, statement by statement. Nothing that a function says about itself is believed: a replacement that wears the name
and the ``__wrapped__`` of the original still has other code.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

# What a global name stands for in known code. Under another name, or with another object behind it, code is unknown.
MODULES = {"F": "torch.nn.functional", "nn": "torch.nn", "torch": "torch"}

# Of each decorator: its module, its name, the functions within it that lead to the one that takes the method's place, and the variable
# by which that one calls the method.
DECORATORS = (
    ("transformers.utils.deprecation", "deprecate_kwarg", ("wrapper", "wrapped_func"), "func"),
    (
        "transformers.modeling_layers",
        "GradientCheckpointingLayer.__init_subclass__",
        ("forward_with_checkpointing",),
        "forward",
    ),
)

SIGNATURE = "its signature"
_IGNORED_FIELDS = frozenset(
    ("annotation", "returns", "decorator_list", "type_comment", "type_params", "ctx", "kind", "name")
)


class UnknownCode(Exception):
    """Why a function is not one that is known."""


class Unwrapped(NamedTuple):
    """A function without its decorators."""

    function: Any
    uncheckpointed: Any
    """The function with all decorators but the outermost one for gradient checkpointing."""
    renamed: frozenset[str]
    """Keywords that a decorator renames."""


def unwrap(function: Any) -> Unwrapped:
    """Take ``function`` out of the decorators that are known. Nothing else is looked through, whatever ``__wrapped__`` says."""
    outermost, uncheckpointed, renamed = function, function, set[str]()
    while (variable := _variable_of_decorator(function)) is not None:
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        if function is outermost and variable == "forward":
            uncheckpointed = cells[variable].cell_contents
        if "old_name" in cells:
            renamed.add(cells["old_name"].cell_contents)
        function = cells[variable].cell_contents
    return Unwrapped(function, uncheckpointed, frozenset(renamed))


def _variable_of_decorator(function: Any) -> str | None:
    """How the decorator that made ``function`` calls what it decorates; None if no known decorator made it."""
    code = getattr(function, "__code__", None)
    for module_name, path, inner_names, variable in DECORATORS:
        decorator: Any = sys.modules.get(module_name)
        for name in path.split("."):
            decorator = inspect.getattr_static(decorator, name, None)
        decorator = getattr(decorator, "__func__", decorator)
        if code is not None and code is code_within(getattr(decorator, "__code__", None), inner_names):
            return variable
    return None


def code_within(code: CodeType | None, names: Iterable[str]) -> CodeType | None:
    """The code of a function that is defined within another, by the names on the way to it."""
    for name in names:
        constants = () if code is None else code.co_consts
        code = next((each for each in constants if isinstance(each, CodeType) and each.co_name == name), None)
    return code


def fingerprint(function: Any) -> list[tuple[str, str]]:
    """The signature and each statement of ``function``: its text, for a reader, and eight hexadecimal digits that stand for it.

    The digits depend on node types, names and constants alone: not on annotations, docstring, decorators, the function's own name,
    comments and layout.

    Raises:
        UnknownCode: there is no source.
    """
    definition = _definition(function)
    statements = definition.body[ast.get_docstring(definition) is not None :]
    parts = [(SIGNATURE, definition.args), *((ast.unparse(each), each) for each in statements)]
    return [(text, hashlib.sha256(" ".join(_tokens(node)).encode()).hexdigest()[:8]) for text, node in parts]


def verify(function: FunctionType) -> None:
    """Check that the source of ``function`` tells what it does.

    Raises:
        UnknownCode: this Python makes other code of it (a file may have changed since, and a function may name a file that it is not
            from), it has other defaults, it is a closure, or a global name does not stand for the module that it names.
    """
    code = function.__code__
    if code.co_freevars:
        raise UnknownCode(f"it is a closure over {', '.join(code.co_freevars)}")
    # Python makes other code for a call of a function in an imported module, hence the import.
    definition = _definition(function)
    bare = ast.FunctionDef(**{**dict(ast.iter_fields(definition)), "decorator_list": [], "returns": None})
    imports = ast.Import([ast.alias(name) for name in MODULES])
    module = compile(ast.fix_missing_locations(ast.Module([imports, bare], [])), "<source>", "exec", dont_inherit=True)
    made = code_within(module, (bare.name,))
    if made is None or _content(made) != _content(code):
        raise UnknownCode("it was not made from the source in its file")
    arguments = definition.args
    named = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    try:
        positional = tuple(map(ast.literal_eval, arguments.defaults))
        by_name = {each.arg: ast.literal_eval(value) for each, value in named if value is not None}
    except ValueError:
        raise UnknownCode("it has defaults that are no constants") from None
    if repr((positional, by_name)) != repr((function.__defaults__ or (), function.__kwdefaults__ or {})):
        raise UnknownCode("its defaults are not those in its source")
    for name in code.co_names:
        if name in function.__globals__ and function.__globals__[name] is not sys.modules.get(MODULES.get(name, "")):
            raise UnknownCode(f"its name {name!r} stands for something else")


def place(function: FunctionType) -> str:
    return f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}"


def _tokens(node: Any) -> Iterator[str]:
    """The tree as words. An empty field does not count: which fields a tree has differs between versions of Python."""
    if isinstance(node, ast.AST):
        yield f"({type(node).__name__}"
        for name in node._fields:
            value = getattr(node, name, None)
            if isinstance(node, ast.JoinedStr):  # Python 3.12 puts empty strings into it
                value = [each for each in node.values if not (isinstance(each, ast.Constant) and each.value == "")]
            if name not in _IGNORED_FIELDS and value is not None and value != []:
                yield name
                yield from _tokens(value)
        yield ")"
    elif isinstance(node, list):
        for each in ("[", *node, "]"):
            yield from _tokens(each)
    else:
        yield repr(node)


def _definition(function: Any) -> ast.FunctionDef:
    if not isinstance(function, FunctionType):
        raise UnknownCode(f"it is a {type(function).__name__}, not a plain function")
    try:
        # Of the code, not of the function, since that would follow __wrapped__.
        source = inspect.getsource(function.__code__)
        indented = source[:1].isspace()
        tree: Any = ast.parse("if True:\n" + source if indented else source).body[0]
        definition = tree.body[0] if indented else tree
    except (OSError, SyntaxError, IndexError):
        raise UnknownCode("it has no source to be known by") from None
    if not isinstance(definition, ast.FunctionDef):
        raise UnknownCode("it is not defined by a def statement")
    return definition


def _content(code: CodeType) -> tuple[Any, ...]:
    constants = [_content(each) if isinstance(each, CodeType) else (type(each), each) for each in code.co_consts]
    return (
        code.co_code,
        constants,
        code.co_names,
        code.co_varnames,
        code.co_argcount,
        code.co_kwonlyargcount,
        code.co_flags & 0x0C,
    )
