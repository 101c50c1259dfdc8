"""Who may import whom, and how large things may get: the promises of the design about the code itself."""

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

from tests.support.code_size import MUST_READ, ROOT, functions, lines_of_code, program, size, the_map

OURS = {"orderproc", "consumer", "core", "handlers", "lambdas", "tests", "tools"}
INNER = ("core.base", "core.order")
MAY_IMPORT = {  # of what is ours; a name stands for itself and all below it, and the longest place counts
    "orderproc.py": {"core"},
    "consumer.py": {"core"},
    "core/events.py": {"core.order.events"},
    "core/base/": {"core.base"},
    "core/order/": {*INNER},
    "core/store/": {*INNER, "core.store"},
    "core/bus/": {*INNER, "core.bus"},
    "core/flow/": {*INNER, "core.store", "core.bus.bus", "core.flow"},
    "core/http/": {*INNER, "core.store", "core.http"},
    "core/running/": {*INNER, "core.store", "core.bus", "core.http", "core.running"},
    "core/running/wiring.py": {*INNER, "core.store", "core.bus", "core.flow", "core.running"},
    "handlers/": {"core.events"},
    "lambdas/": {"lambdas"},
    "lambdas/local.py": {"lambdas", "core.http.serving", "core.running.process"},
}
MAY_IMPORT_IN_A_FUNCTION = {"orderproc.py": {"consumer", "lambdas.local"}}
ONLY = {  # who speaks to the outside through what
    "pymongo": {"core/store/"},
    "bson": {"core/store/"},
    "mongomock": {"core/store/connection.py"},
    "pika": {"core/bus/"},
    "secantus": set(),
    "secantusdb": set(),
    "jsonschema": {"core/order/schemas.py"},
    "waitress": {"core/http/serving.py"},
    "bottle": {"core/http/", "core/running/health.py", "orderproc.py", "lambdas/local.py"},
    "boto3": {"core/flow/services.py", "lambdas/tokens.py"},
    "prometheus_client": {"core/base/metrics.py", "core/running/health.py"},
}
LARGEST_PROGRAM = 3200  # lines of code; a commit that raises this says why
LARGEST_MUST_READ = 550
LARGEST_FILE = 200
LARGEST_FUNCTION = 25
MOST_FILES = 9  # in a folder


def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def imports(node: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """(module, whether the import is inside a function) of all imports below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((name.name, inside) for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = child.module or ""
            is_ours = module.split(".")[0] in OURS
            yield from ((f"{module}.{name.name}" if is_ours else module, inside) for name in child.names)
        yield from imports(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def allowed(path: str, module: str, inside: bool) -> bool:
    place = max((place for place in MAY_IMPORT if path.startswith(place)), key=len)
    given = MAY_IMPORT[place] | (MAY_IMPORT_IN_A_FUNCTION.get(path, set()) if inside else set())
    return any(module == name or module.startswith(name + ".") for name in given)


SAMPLE = textwrap.dedent('''\
    """A module
    with a docstring."""

    import core  # a comment


    # another
    @cache
    def outer(a,
              b):
        """Here too."""
        from core import bus, store
        def inner():
            import pika.spec
            return """not
    a docstring"""
        return inner


    class C:
        """And here."""
        x = 1
    ''')


def test_lines_of_code_are_counted_without_blanks_comments_and_docstrings():
    assert lines_of_code(SAMPLE) == 12
    assert lines_of_code('"""Only a docstring."""\n\n# a comment\n') == 0


def test_a_function_is_counted_without_decorators_and_docstring():
    assert functions(ast.parse(SAMPLE)) == {"outer:9": 8, "inner:13": 4}


def test_imports_are_found_wherever_they_are():
    assert list(imports(ast.parse(SAMPLE))) == [
        ("core", False),
        ("core.bus", True),
        ("core.store", True),
        ("pika.spec", True),
    ]


@pytest.mark.parametrize(
    ("path", "module", "inside", "may"),
    [
        ("core/bus/rabbit.py", "core.bus.publisher.Publisher", False, True),
        ("core/bus/rabbit.py", "core.store.orders.Orders", True, False),
        ("core/bus/rabbit.py", "consumer", True, False),
        ("core/bus/rabbit.py", "handlers.email", False, False),
        ("core/order/state_machine.py", "core.store.orders", True, False),
        ("core/base/ids.py", "core.order.events", False, False),
        ("core/flow/sweep.py", "core.bus.bus.Bus", False, True),
        ("core/flow/sweep.py", "core.bus.rabbit.Rabbit", False, False),
        ("core/store/orders.py", "core.http.problems", False, False),
        ("handlers/email.py", "core.events.Event", False, True),
        ("handlers/email.py", "core.order.events.Event", False, False),
        ("handlers/email.py", "core.store.orders", True, False),
        ("handlers/email.py", "core", False, False),
        ("handlers/email.py", "handlers.shipping", False, False),
        ("orderproc.py", "consumer", False, False),
        ("orderproc.py", "consumer", True, True),
        ("consumer.py", "orderproc", True, False),
        ("lambdas/make_label.py", "core.http.serving", False, False),
        ("lambdas/local.py", "core.http.serving.serve", False, True),
        ("core/store/orders.py", "core_of_another", False, False),
    ],
)
def test_the_rule_itself(path, module, inside, may):
    assert allowed(path, module, inside) is may


@pytest.mark.parametrize("path", program())
def test_a_module_imports_only_what_its_room_may(path):
    for module, inside in imports(tree(path)):
        top = module.split(".")[0]
        if top in OURS:
            assert allowed(path, module, inside), f"{path} must not import {module}"
        places = ONLY.get(top, {path})
        assert any(path.startswith(place) for place in places), f"{path} must not import {module}: {places} may"


@pytest.mark.parametrize("path", program())
def test_a_module_says_what_it_is(path):
    assert ast.get_docstring(tree(path)), f"{path} has no docstring"


@pytest.mark.parametrize("path", program())
def test_a_public_name_says_what_it_promises(path):
    """Everything public but a method that keeps a protocol's promise, a route, a handler: these are told elsewhere."""
    told_elsewhere = (
        "handlers/",
        "lambdas/",
        "core/bus/rabbit.py",
        "core/bus/memory.py",
        "orderproc.py",
        "core/bus/pub",
    )
    for node in tree(path).body:
        public = isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
        if public and not path.startswith(told_elsewhere):
            assert ast.get_docstring(node), f"{path}: {node.name}"


def test_there_is_something_to_check():
    assert {"orderproc.py", "consumer.py", "core/store/orders.py", "handlers/email.py"} <= set(program())


def test_importing_starts_nothing_and_needs_no_setting():
    code = "import threading, orderproc, consumer; assert threading.active_count() == 1"
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, env={}, check=True, timeout=60)


def test_functions_are_short():
    lengths = {f"{path}:{name}": length for path in program() for name, length in functions(tree(path)).items()}
    print(f"{len(lengths)} functions, median {median(lengths.values())}, longest {max(lengths.values())}")
    assert {name: length for name, length in lengths.items() if length > LARGEST_FUNCTION} == {}
    assert median(lengths.values()) <= 5
    assert sum(length < 8 for length in lengths.values()) >= len(lengths) * 2 / 3


def test_files_are_short_and_folders_small():
    assert {path: size(path) for path in program() if size(path) > LARGEST_FILE} == {}
    folders = [str(Path(path).parent) for path in program()]
    assert {folder: folders.count(folder) for folder in folders if folders.count(folder) > MOST_FILES} == {}


def test_the_program_is_small():
    sizes = {path: size(path) for path in program()}
    print(sum(sizes.values()), sizes)
    assert sum(sizes.values()) < LARGEST_PROGRAM, sizes


def test_what_one_must_read_is_read_in_an_hour():
    assert sum(map(size, MUST_READ)) <= LARGEST_MUST_READ, {path: size(path) for path in MUST_READ}


def test_the_map_shows_every_file_as_it_is():
    assert (ROOT / "docs/map.md").read_text() == the_map(), "python -m tests.support.code_size > docs/map.md"
