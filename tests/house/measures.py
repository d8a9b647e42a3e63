"""The numbers of the house, read off the source: sizes, density, names, and who imports whom.

python tests/house/measures.py        a table by room, and all that is over its limit
"""

import ast
import io
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "flowsim"

START = 129_829  # tokens before the house was built, at 12.7 a line
TOKENS = 134_000  # what naming the parts of formulas has cost; a tenth less than START is the aim
DENSITY = 9.5  # tokens a line of code
ARROWS = 75  # pairs of rooms of which one imports from the other
WIDTH = 100  # characters a line
LINES = 400  # lines a file
BODY = 50  # lines a function, without its docstring
LOCALS = 12  # names that a function assigns

LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (ast.Module, ast.ClassDef, *FUNCTION)


@dataclass(frozen=True)
class Source:
    """One file of the package."""

    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def name(self) -> str:
        return str(self.path.relative_to(PACKAGE))

    @property
    def module(self) -> str:
        parts = self.path.relative_to(PACKAGE.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def room(self) -> str:
        return self.path.relative_to(PACKAGE).parts[0].removesuffix(".py")

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @cached_property
    def code(self) -> list[tokenize.TokenInfo]:
        """Tokens that are neither layout, comment nor docstring."""
        documented = {
            line
            for node in ast.walk(self.tree)
            if isinstance(node, DOCUMENTED)
            for text in [docstring(node)]
            if text is not None
            for line in range(text.lineno, (text.end_lineno or text.lineno) + 1)
        }
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        found = [t for t in tokens if t.type not in LAYOUT and t.start[0] not in documented]
        return list(whole_strings(found))

    @property
    def functions(self) -> Iterator[ast.FunctionDef]:
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef))

    @property
    def imports(self) -> set[str]:
        """Modules of the package that this one imports, inside functions too."""
        found: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flowsim"):
                for alias in node.names:
                    found |= {node.module or "", f"{node.module}.{alias.name}"}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if alias.name.startswith("flowsim.")}
        return found - {self.module}


def whole_strings(tokens: list[tokenize.TokenInfo]) -> Iterator[tokenize.TokenInfo]:
    """The tokens with each f-string as one of them, as it was before Python 3.12."""
    start, end = (getattr(tokenize, f"FSTRING_{name}", None) for name in ("START", "END"))
    depth = 0
    for token in tokens:
        depth -= token.type == end
        if depth == 0 and token.type != end:
            yield token
        depth += token.type == start


def docstring(node: ast.AST) -> ast.Expr | None:
    body = getattr(node, "body", [])
    first = body[0] if body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        return first if isinstance(first.value.value, str) else None
    return None


def body_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    text = docstring(function)
    documented = 0 if text is None else (text.end_lineno or 0) - text.lineno + 1
    return (function.end_lineno or 0) - function.lineno + 1 - documented


def local_names(function: ast.FunctionDef) -> set[str]:
    """Names that a function itself binds, without its parameters and without inner scopes."""
    a = function.args
    given = {x.arg for x in [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg] if x}
    inner = (*FUNCTION, ast.ClassDef, ast.Lambda)
    comprehensions = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, inner):
                found.update({child.name} if not isinstance(child, ast.Lambda) else set())
            elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                found.add(child.id)
            elif not isinstance(child, comprehensions):
                visit(child)

    visit(function)
    return found - given - {"_"}


def top_level_names(source: Source) -> Iterator[str]:
    """Public names that a file defines at its top level."""
    for node in source.tree.body:
        if isinstance(node, (*FUNCTION, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            continue
        yield from (name for name in names if not name.startswith("_"))


SOURCES = [Source(path) for path in sorted(PACKAGE.rglob("*.py"))]
MODULES = {source.module: source for source in SOURCES}


def tokens() -> int:
    return sum(len(source.code) for source in SOURCES)


def density(sources: list[Source]) -> float:
    """Tokens a line that holds code."""
    lines = sum(len({token.start[0] for token in source.code}) for source in sources)
    return sum(len(source.code) for source in sources) / max(lines, 1)


def arrows() -> set[tuple[str, str]]:
    """Pairs of rooms of which the first imports from the second. The list of public names is
    none."""
    pairs = {
        (source.room, MODULES[name].room)
        for source in SOURCES
        for name in source.imports & MODULES.keys() - {"flowsim"}
    }
    return {(a, b) for a, b in pairs if a != b}


def circle() -> list[str]:
    """Modules that import each other in a ring, or nothing."""
    edges = {
        name: {m for m in source.imports & MODULES.keys() if not is_room_of(m, name)}
        for name, source in MODULES.items()
    }
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(edges[name]):
            if found := walk(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((ring for name in sorted(edges) if (ring := walk(name, []))), [])


def is_room_of(folder: str, module: str) -> bool:
    """Whether a module lies in this folder: then Python imports the folder first in any case."""
    return module.startswith(f"{folder}.")


def wide_lines() -> list[str]:
    return [
        f"{source.name}:{number}"
        for source in SOURCES
        for number, line in enumerate(source.lines, 1)
        if len(line) > WIDTH
    ]


def long_files() -> list[str]:
    return [f"{s.name}: {len(s.lines)}" for s in SOURCES if len(s.lines) > LINES]


def long_functions() -> list[str]:
    return [
        f"{source.name}:{function.lineno} {function.name}: {body_lines(function)}"
        for source in SOURCES
        for function in source.functions
        if body_lines(function) > BODY
    ]


def crowded_functions() -> list[str]:
    return [
        f"{source.name}:{function.lineno} {function.name}: {len(local_names(function))}"
        for source in SOURCES
        for function in source.functions
        if len(local_names(function)) > LOCALS
    ]


def names_defined_twice() -> list[str]:
    homes = defaultdict(set)
    for source in SOURCES:
        for name in top_level_names(source):
            homes[name].add(source.name)
    return [f"{name}: {', '.join(sorted(at))}" for name, at in homes.items() if len(at) > 1]


def files_named_like_a_function() -> list[str]:
    return [
        source.name
        for source in SOURCES
        for other in SOURCES
        if source.path.parent == other.path.parent
        for function in other.tree.body
        if isinstance(function, FUNCTION) and function.name == source.path.stem
    ]


def asserts() -> list[str]:
    return [
        f"{source.name}:{node.lineno}"
        for source in SOURCES
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Assert)
    ]


LISTS = [
    wide_lines,
    long_files,
    long_functions,
    crowded_functions,
    names_defined_twice,
    files_named_like_a_function,
    asserts,
]


def report() -> str:
    rooms = defaultdict(list)
    for source in SOURCES:
        rooms[source.room].append(source)
    counts = Counter({room: sum(len(s.code) for s in held) for room, held in rooms.items()})
    rows = [f"{room:12} {count:7} {density(rooms[room]):6.1f}" for room, count in counts.items()]
    rows.append(f"{'all':12} {tokens():7} {density(SOURCES):6.1f}   {len(arrows())} arrows")
    for over in LISTS:
        rows += ["", f"{over.__name__}: {len(over())}", *(f"  {row}" for row in over())]
    return "\n".join([*rows, "", f"circle: {' -> '.join(circle()) or 'none'}"])


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
