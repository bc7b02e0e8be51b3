"""Sizes, types and docstrings of the code, and no work at import time."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from statistics import median

import pytest
from source import SourceFile, source_files

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_MEDIAN_LINES = 160
Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# Runs inside the sandbox's own process and gives every program the same random numbers.
SEEDS_ITS_PROCESS = {"spear_megatron/environments/sandbox/jail/program.py"}


def functions(tree: ast.Module) -> Iterator[tuple[Function, bool]]:
    """(function, whether it is public): methods of public classes and functions at module level count as public."""

    def walk(node: ast.AST, public: bool, nested: bool) -> Iterator[tuple[Function, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, FUNCTIONS):
                yield child, public and not nested and not child.name.startswith("_")
                yield from walk(child, public, True)
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, public and not child.name.startswith("_"), nested)
            else:
                yield from walk(child, public, nested)

    return walk(tree, True, False)


def test_files_are_small() -> None:
    sizes = {file.name: file.num_lines for file in source_files()}
    assert {name: size for name, size in sizes.items() if size > MAX_FILE_LINES} == {}
    assert median(size for size in sizes.values() if size) <= MAX_MEDIAN_LINES


@pytest.mark.parametrize("file", source_files(), ids=lambda file: file.name)
def test_functions_are_short_typed_and_documented(file: SourceFile) -> None:
    problems = []
    for node, public in functions(file.tree):
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > MAX_FUNCTION_LINES:
            problems.append(f"{node.name} has {length} lines")
        if not public:
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        untyped = [arg.arg for arg in arguments if arg and arg.annotation is None and arg.arg not in ("self", "cls")]
        if untyped or node.returns is None:
            problems.append(f"{node.name} lacks types: {untyped or 'return'}")
        if ast.get_docstring(node) is None and not is_small(node):
            problems.append(f"{node.name} has no docstring")
    assert problems == [], file.name


def is_small(node: Function) -> bool:
    """Properties and overrides of up to two statements may speak for themselves."""
    return len(node.body) <= 2 and (bool(node.decorator_list) or len(node.args.args) <= 1 or node.name == "forward")


@pytest.mark.parametrize("file", source_files(), ids=lambda file: file.name)
def test_modules_and_public_classes_are_documented(file: SourceFile) -> None:
    if file.num_lines:
        assert ast.get_docstring(file.tree), f"{file.name} has no docstring"
    for node in file.tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{file.name}: {node.name} has no docstring"


# Calls at module level that only define: everything else is work at import time.
FORBIDDEN_CALLS = {
    "print", "open", "exec", "eval", "torch.manual_seed", "torch.set_num_threads", "torch.set_default_dtype",
    "random.seed", "np.random.seed", "numpy.random.seed", "warnings.filterwarnings", "warnings.simplefilter",
    "logging.basicConfig", "os.putenv", "os.environ.setdefault", "os.environ.update", "signal.signal", "os.makedirs",
    "setattr", "sys.path.insert", "sys.path.append", "subprocess.run", "torch.cuda.is_available", "torch.cuda.init",
    "torch.backends.cuda.matmul", "multiprocessing.set_start_method", "atexit.register",
}  # fmt: skip


def assigned(node: ast.AST) -> list[ast.expr]:
    """Targets of an assignment; writing to an attribute or item changes something that was there before."""
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AugAssign) else []


def import_time_nodes(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: not the bodies of functions, nor ``if __name__ == '__main__'``."""
    stack: list[ast.AST] = list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
            continue
        if isinstance(node, FUNCTIONS):
            stack += [*node.decorator_list, *node.args.defaults, *(item for item in node.args.kw_defaults if item)]
            continue
        if isinstance(node, ast.Lambda):
            continue
        yield node
        stack += list(ast.iter_child_nodes(node))


@pytest.mark.parametrize("file", source_files(), ids=lambda file: file.name)
def test_importing_does_no_work(file: SourceFile) -> None:
    problems = []
    for node in import_time_nodes(file.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
            problems.append(f"line {node.lineno}: {ast.unparse(node.func)}")
        for target in assigned(node):
            if isinstance(target, (ast.Attribute, ast.Subscript)):
                problems.append(f"line {target.lineno}: writes {ast.unparse(target)}")
    assert problems == [], file.name


GLOBAL_RANDOM = {
    "torch.manual_seed", "torch.random.manual_seed", "torch.seed", "random.seed", "random.random", "random.randint",
    "random.choice", "random.shuffle", "random.sample", "random.uniform", "np.random.seed", "np.random.rand",
    "np.random.randn", "np.random.randint", "np.random.choice", "np.random.shuffle", "np.random.permutation",
}  # fmt: skip


@pytest.mark.parametrize("file", source_files(), ids=lambda file: file.name)
def test_no_swallowed_exceptions_and_no_global_random_numbers(file: SourceFile) -> None:
    problems = []
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                problems.append(f"line {node.lineno}: bare except")
            broad = node.type is not None and ast.unparse(node.type) in ("Exception", "BaseException")
            if broad and all(isinstance(item, (ast.Pass, ast.Continue)) for item in node.body):
                problems.append(f"line {node.lineno}: swallows {ast.unparse(node.type)}")  # type: ignore[arg-type]
        is_random = isinstance(node, ast.Call) and ast.unparse(node.func) in GLOBAL_RANDOM
        if is_random and file.name not in SEEDS_ITS_PROCESS:
            problems.append(f"line {node.lineno}: {ast.unparse(node.func)} uses the global random state")
    assert problems == [], file.name
