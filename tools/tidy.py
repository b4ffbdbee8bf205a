"""Rules of this repository that no other program holds. `python -m tools.tidy [ROOT]` prints `file:line rule: why`.

The rules, each with the name that it is printed under:

syntax          a Python file parses
file-length     a Python file has at most 600 lines (900 where FILE_LINES_EXCEPTIONS says so)
function-length a function has at most 70 lines, from `def` to its end
banned-call     nothing takes the wall clock, draws unseeded random numbers, or awaits tasks through sets, outside
                adapters, command lines and tools; nothing opens files, sockets, processes or threads without an import
                that a contract could forbid, outside adapters, command lines and `testing`; tests neither sleep nor
                draw unseeded numbers, outside the kinds that run real processes
todo            no notes to ourselves: do it, or write an issue
skip-reason     a skipped or expectedly failing test says why
docstring       every module begins by telling what it is for, every test file what it claims
home-path       no file names somebody's home directory
dead-file       every module is imported by something, is a program, or is named by pyproject.toml

Pure but for `main`: a rule is a function of one file's text, `dead_files` of all of them.
Limit: names are resolved through import statements only; `getattr(time, "time")` and `loop.create_server` get past it, and
past no reviewer.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

FILE_LINES_MAX: Final = 600
FILE_LINES_EXCEPTIONS: Final[Mapping[str, int]] = {
    "replication/raft.py": 900,
    "txn/evaluate.py": 900,
}
FUNCTION_LINES_MAX: Final = 70

PRODUCT: Final = ("kvstore/", "txn/", "replication/")
WORLDLY: Final = ("kvstore/adapters/", "kvstore/cli/", "tools/")  # may read clocks and draw numbers
OPENERS: Final = (
    "kvstore/adapters/",
    "kvstore/cli/",
    "kvstore/testing/",
)  # may open files and sockets
REAL_TESTS: Final = ("tests/integration/", "tests/crash/", "tests/contract/")  # run the real thing

TEXT_SUFFIXES: Final = (
    ".py",
    ".md",
    ".toml",
    ".txt",
    ".yaml",
    ".yml",
    ".json",
    ".html",
    ".js",
    ".css",
    ".sh",
    ".cfg",
)
TEXT_NAMES: Final = ("Makefile", "LICENSE", ".editorconfig", ".gitignore", "run")
SKIPPED_DIRECTORIES: Final = ("__pycache__", "build", "dist", "htmlcov", "node_modules")
KEPT_HIDDEN: Final = (".ci", ".github")

CLOCK_CALLS: Final = (
    "time.time",
    "time.time_ns",
    "datetime.datetime.now",
    "datetime.datetime.today",
    "datetime.datetime.utcnow",
    "datetime.date.today",
)
TASK_SET_CALLS: Final = (
    "asyncio.wait",
    "asyncio.TaskGroup",
    "asyncio.all_tasks",
    "asyncio.as_completed",
)
BUILTIN_OPEN: Final = "builtins.open"
OPENING_CALLS: Final = (
    BUILTIN_OPEN,
    "asyncio.create_subprocess_exec",
    "asyncio.create_subprocess_shell",
    "asyncio.open_connection",
    "asyncio.open_unix_connection",
    "asyncio.start_server",
    "asyncio.start_unix_server",
    "asyncio.to_thread",
)
SLEEP_CALLS: Final = ("time.sleep",)
SEEDED: Final = "random.Random"  # allowed everywhere, if it was handed a seed

NOTE: Final = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")
HOME_PATH: Final = re.compile(r"(?<![\w.~])/(?:(?:home|Users)/\w|(?:root)/)")

SKIPPING: Final = ("pytest.skip", "pytest.xfail", "pytest.importorskip")
SKIP_MARKS: Final = ("pytest.mark.skip", "pytest.mark.skipif", "pytest.mark.xfail", "unittest.skip")


class Violation(NamedTuple):
    """One broken rule. `path` is relative to the root, with slashes; `line` counts from 1."""

    path: str
    line: int
    rule: str
    why: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.rule}: {self.why}"


class Source(NamedTuple):
    """One Python file, parsed. `names` maps what its imports bind, and `open`, to the full dotted name."""

    path: str
    text: str
    tree: ast.Module
    names: Mapping[str, str]


def main(arguments: list[str] | None = None) -> int:
    """Check the tree below ROOT (default: the current directory). Returns 1 if anything is wrong."""
    given = sys.argv[1:] if arguments is None else arguments
    root = Path(given[0]) if given else Path.cwd()
    violations = check_files(read_tree(root))
    for violation in violations:
        print(violation)
    if violations:
        print(f"tidy: {len(violations)} to put in order", file=sys.stderr)
    return 1 if violations else 0


def read_tree(root: Path) -> dict[str, str]:
    """Text of every file that tidy looks at, by relative path, in order; not of hidden and generated directories."""
    files = {}
    for path in sorted(_walk(root)):
        if path.suffix in TEXT_SUFFIXES or path.name in TEXT_NAMES:
            files[path.relative_to(root).as_posix()] = path.read_text(encoding="utf-8")
    return files


def check_files(files: Mapping[str, str]) -> list[Violation]:
    """All violations in these files (path -> text), sorted by path and line."""
    violations: list[Violation] = []
    sources = []
    for path, text in files.items():
        violations.extend(check_text(path, text))
        if path.endswith(".py"):
            try:
                source = parse(path, text)
            except SyntaxError as error:
                violations.append(Violation(path, error.lineno or 1, "syntax", error.msg))
                continue
            sources.append(source)
            for rule in RULES:
                violations.extend(rule(source))
    violations.extend(dead_files(sources, files.get("pyproject.toml", "")))
    return sorted(set(violations))


def check_text(path: str, text: str) -> Iterator[Violation]:
    """Rules for every kind of text: todo, home-path."""
    for number, line in enumerate(text.splitlines(), start=1):
        if note := NOTE.search(line):
            yield Violation(
                path, number, "todo", f"{note.group()} is not done; do it, or write an issue"
            )
        if HOME_PATH.search(line):
            yield Violation(path, number, "home-path", "names a directory of one machine")


def parse(path: str, text: str) -> Source:
    """Raises: SyntaxError."""
    tree = ast.parse(text, filename=path)
    names = {"open": BUILTIN_OPEN}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.partition(".")[0]
                names[bound] = alias.name if alias.asname else bound
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return Source(path, text, tree, names)


def file_length(source: Source) -> Iterator[Violation]:
    """No file is longer than a reader's patience."""
    limit = FILE_LINES_EXCEPTIONS.get(source.path, FILE_LINES_MAX)
    lines = len(source.text.splitlines())
    if lines > limit:
        yield Violation(source.path, limit + 1, "file-length", f"{lines} lines; at most {limit}")


def function_length(source: Source) -> Iterator[Violation]:
    """No function is longer than a screen."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                why = f"{node.name} has {lines} lines; at most {FUNCTION_LINES_MAX}"
                yield Violation(source.path, node.lineno, "function-length", why)


def banned_call(source: Source) -> Iterator[Violation]:
    """Nothing that would make two runs of one seed differ, and no way around the ports. A mention counts, called or not."""
    for node, name in _mentions(source):
        why = _ban(source.path, name)
        if why:
            yield Violation(source.path, node.lineno, "banned-call", f"{name}: {why}")
    for call in ast.walk(source.tree):
        if not isinstance(call, ast.Call) or call.args or call.keywords:
            continue
        if _dotted(call.func, source.names) == SEEDED and _ban(source.path, "random.random"):
            why = f"{SEEDED}(): give it a seed"
            yield Violation(source.path, call.lineno, "banned-call", why)


def skip_reason(source: Source) -> Iterator[Violation]:
    """Who skips a test says why: a reason (a keyword, or pytest.skip's argument) that is not empty."""
    if not source.path.startswith("tests/"):
        return
    called: dict[ast.AST, ast.Call] = {
        n.func: n for n in ast.walk(source.tree) if isinstance(n, ast.Call)
    }
    for node, name in _mentions(source):
        if name not in SKIPPING + SKIP_MARKS:
            continue
        call = called.get(node)
        positional = name in {"pytest.skip", "pytest.xfail", "unittest.skip", "pytest.mark.skip"}
        if call is None or not _has_reason(call, positional=positional):
            yield Violation(source.path, node.lineno, "skip-reason", f"{name} without a reason")


def docstring(source: Source) -> Iterator[Violation]:
    """Every module begins with its story."""
    if not (ast.get_docstring(source.tree) or "").strip():
        why = (
            "a test file says what it claims"
            if source.path.startswith("tests/")
            else "a module says what it is for"
        )
        yield Violation(source.path, 1, "docstring", why)


RULES: Final[tuple[Callable[[Source], Iterator[Violation]], ...]] = (
    file_length,
    function_length,
    banned_call,
    skip_reason,
    docstring,
)


def dead_files(sources: list[Source], pyproject: str) -> Iterator[Violation]:
    """Modules of the product and the tools that nothing imports, starts or names."""
    imported = {name for source in sources for name in _imports(source)}
    for source in sources:
        module = ".".join(PurePosixPath(source.path).with_suffix("").parts)
        if not source.path.startswith((*PRODUCT, "tools/")) or source.path.endswith("/__init__.py"):
            continue
        is_program = module.endswith("__main__") or "__main__" in _compared_names(source)
        if module not in imported and not is_program and module not in pyproject:
            yield Violation(source.path, 1, "dead-file", "nothing imports it")


def _walk(directory: Path) -> Iterator[Path]:
    for path in directory.iterdir():
        if path.is_symlink():
            continue
        if path.is_dir():
            hidden = path.name.startswith(".") and path.name not in KEPT_HIDDEN
            if (
                not hidden
                and path.name not in SKIPPED_DIRECTORIES
                and not path.name.endswith(".egg-info")
            ):
                yield from _walk(path)
        else:
            yield path


def _mentions(source: Source) -> Iterator[tuple[ast.expr, str]]:
    """Every name and attribute that an import statement explains, and `open`, as (node, full dotted name)."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute | ast.Name):
            name = _dotted(node, source.names)
            if name is not None:
                yield node, name


def _dotted(node: ast.expr, names: Mapping[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value, names)
        return f"{before}.{node.attr}" if before is not None else None
    return None


def _ban(path: str, name: str) -> str:
    """Why this name must not be mentioned in this file; empty if it may."""
    is_random = name.startswith("random.") and not f"{name}.".startswith(f"{SEEDED}.")
    if path.startswith(PRODUCT) and not path.startswith(WORLDLY):
        if name in CLOCK_CALLS:
            return "the time is passed in"
        if is_random:
            return "draw from a random.Random that is passed in"
        if name in TASK_SET_CALLS:
            return "it iterates over a set of tasks; use gather or the ordered nursery"
    if path.startswith(PRODUCT) and not path.startswith(OPENERS) and name in OPENING_CALLS:
        return "files, sockets, processes and threads are behind ports"
    if path.startswith("tests/") and not path.startswith(REAL_TESTS):
        if name in SLEEP_CALLS:
            return "tests never sleep"
        if is_random:
            return "seed a random.Random"
    return ""


def _has_reason(call: ast.Call, *, positional: bool) -> bool:
    given = [keyword.value for keyword in call.keywords if keyword.arg in {"reason", "msg"}]
    if positional:
        given.extend(call.args[:1])
    return any(
        not isinstance(value, ast.Constant) or bool(str(value.value or "").strip())
        for value in given
    )


def _imports(source: Source) -> Iterator[str]:
    """Every module that this file may mean, with its parents: `from a import b` means a, and perhaps a.b."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.count(".") >= 1
        ):
            yield node.value.partition(":")[
                0
            ]  # `python -m tools.x`, importlib.import_module("kvstore.x")


def _compared_names(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if (
            isinstance(node, ast.Compare)
            and isinstance(node.left, ast.Name)
            and node.left.id == "__name__"
        ):
            yield from (
                str(right.value) for right in node.comparators if isinstance(right, ast.Constant)
            )


if __name__ == "__main__":
    sys.exit(main())
