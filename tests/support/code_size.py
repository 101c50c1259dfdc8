"""How large the program is, as its promises count it. `python -m tests.support.code_size` prints its map."""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUTSIDE = {"tests", "tools", "docs", "examples", "data", "node_modules", "venv", "build"}
MUST_READ = (  # in this order
    "handlers/inventory.py", "core/order/state_machine.py", "core/store/orders.py", "core/store/moves.py",
    "consumer.py", "core/flow/sweep.py",
)  # fmt: skip
SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def program() -> list[str]:
    """All Python that runs in production, sorted as a reader meets it: scripts first, then folders."""
    found = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    ours = [path for path in found if not OUTSIDE & set(path.parts) and not path.parts[0].startswith(".")]
    return [str(path) for path in sorted(ours, key=lambda path: (len(path.parts) > 1, path))]


def lines_of_code(source: str) -> int:
    """Lines that are not blank, not a comment and not part of a docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if text := docstring(node):
            lines -= set(range(text.lineno, text.end_lineno + 1))
    return len(lines)


def docstring(node: ast.AST) -> ast.Expr | None:
    """The docstring of a module, class or function, as the statement that it is."""
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    first = node.body[0] if node.body else None
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and type(first.value.value) is str
    return first if is_text else None


def functions(module: ast.Module) -> dict[str, int]:
    """Name and first line -> lines from `def` to the end, docstring not counted."""
    lengths = {}
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = docstring(node)
            in_docstring = text.end_lineno - text.lineno + 1 if text else 0
            lengths[f"{node.name}:{node.lineno}"] = node.end_lineno - node.lineno + 1 - in_docstring
    return lengths


def size(path: str) -> int:
    """Lines of code of one of the program's files."""
    return lines_of_code((ROOT / path).read_text())


def sentence(path: str) -> str:
    """What a file is: the first sentence of its docstring."""
    text = " ".join((ast.get_docstring(ast.parse((ROOT / path).read_text())) or "").split("\n\n")[0].split())
    end = text.find(". ")
    return text[: end + 1] if end > 0 else text


def the_map() -> str:
    """docs/map.md: a line for each file, by folder."""
    lines = [
        "# Map",
        "",
        "Every file of the program, what it is and how large: lines of code, without blanks, comments and docstrings.",
        "A test compares this page with the code; `python -m tests.support.code_size > docs/map.md` makes it anew.",
        "Bold is what one must read to understand the whole. Imports run one way: down the list of folders in `core`",
        "means further in, and `base` knows nobody.",
    ]
    folder = None
    for path in program():
        if path.endswith("__init__.py"):
            continue
        if str(Path(path).parent) != folder:
            folder = str(Path(path).parent)
            about = sentence(f"{folder}/__init__.py") if folder != "." else "What is started."
            lines += [
                "",
                f"## {'/' if folder == '.' else folder + '/'}",
                "",
                about,
                "",
                "| file | lines | what it is |",
            ]
            lines += ["|---|---|---|"]
        name = f"[{Path(path).name}](../{path})"
        lines += [f"| {f'**{name}**' if path in MUST_READ else name} | {size(path)} | {sentence(path)} |"]
    total = sum(map(size, program()))
    return "\n".join([*lines, "", f"{total} lines in all; {sum(map(size, MUST_READ))} in bold.", ""])


if __name__ == "__main__":
    print(the_map(), end="")
