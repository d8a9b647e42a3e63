"""The API reference: a page for each room, from the docstrings as they stand in the code.

Docstrings are plain text: names in single backticks, code in double ones, formulas and tables
indented or aligned. Here names become links, and what is laid out by hand stays as it is."""

import ast
import pkgutil
import re
from functools import cache
from pathlib import Path

import flowsim

PACKAGE = Path(flowsim.__file__).parent
FOLDER = "api"

MARKED = re.compile(r"(``.+?``|`[^`]+`|\*\*?\w[\w ]*\*\*?)")  # code, names, emphasis
NAME = re.compile(r"`([A-Za-z_][\w.]*)(?:\(.*\))?`")
ALIGNED = re.compile(r"\S {3,}\S")
SPECIAL = re.compile(r"([\\*_|`])")
NAMESPACES = {"clocks", "closed_forms", "data", "diagnostics", "identities", "plots", "reference"}
BUILTINS = {(kind.__doc__ or "").splitlines()[0] for kind in (bool, int, float, str, tuple)}


# --------------------------------------------------------------------------------------------------
# Docstrings
# --------------------------------------------------------------------------------------------------


def as_rst(text: list[str]) -> list[str]:
    """A plain docstring as reStructuredText."""
    paragraphs = re.split(r"\n\s*\n", "\n".join(text).strip("\n"))
    return "\n\n".join(part for p in paragraphs for part in parts_of(p.splitlines())).split("\n")


def parts_of(lines: list[str]) -> list[str]:
    """A paragraph as running text and what is laid out by hand: examples, formulas, tables."""
    if lines[:1] and lines[0].lstrip().startswith(">>>"):
        return ["\n".join(line.strip() for line in lines)]
    if any(ALIGNED.search(line) for line in lines):
        return [literal(lines)]
    parts: list[str] = []
    while lines:
        indented = lines[0].startswith(" ")
        length = next((i for i, line in enumerate(lines) if line.startswith(" ") != indented), None)
        part, lines = lines[:length], lines[length:] if length else []
        parts.append(literal(part) if indented else prose(" ".join(part)))
    return parts


def literal(lines: list[str]) -> str:
    plain = [re.sub(r"(``?)(.+?)\1", r"\2", line) for line in lines]
    return "\n".join(["::", "", *(f"    {line}" for line in plain)])


def prose(text: str) -> str:
    """Running text: code and names are marked up, all else is escaped."""
    parts = MARKED.split(text)
    parts[::2] = [SPECIAL.sub(r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [f"\\ {link(part)}\\ " for part in parts[1::2]]
    return re.sub(r"^([-+•>]|\d+[.)])", r"\\\1", "".join(parts))


def link(code: str) -> str:
    """A name in backticks as a link to where it is defined; other code, and emphasis, as it is."""
    if code.startswith("*"):
        return code
    shown, found = code.strip("`"), NAME.fullmatch(code)
    name = found[1].removeprefix("fs.") if found else ""
    first, *rest = name.split(".")
    if first in NAMESPACES and rest:
        first, *rest = rest
    if first not in homes():
        return f"``{shown}``"
    return f":py:obj:`{shown} <{'.'.join([homes()[first], *rest])}>`"


@cache
def homes() -> dict[str, str]:
    """The full name of each public class and function, by its own name."""
    found: dict[str, str] = {}
    for module in modules():
        tree = ast.parse(source_of(module).read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name[0] != "_":
                found[node.name] = f"{module}.{node.name}"
    return found


# --------------------------------------------------------------------------------------------------
# Pages
# --------------------------------------------------------------------------------------------------


@cache
def modules() -> list[str]:
    return sorted(m.name for m in pkgutil.walk_packages(flowsim.__path__, "flowsim."))


def source_of(module: str) -> Path:
    path = PACKAGE.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def page(room: str) -> str:
    """The modules of a room, each with what it defines, in the order of the source."""
    held = [m for m in modules() if m == f"flowsim.{room}" or m.startswith(f"flowsim.{room}.")]
    parts = [heading(room, "=")]
    for module in held:
        parts += [heading(module, "-")] * (module != held[0])
        names = names_of_users(module)
        parts.append(f".. automodule:: {module}" + ("" if names else "\n   :members:"))
        parts += names
    return "\n\n".join(parts) + "\n"


def heading(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}"


def names_of_users(package: str) -> list[str]:
    """The public names of a package and what they stand for, from its stub."""
    stub = source_of(package).with_suffix(".pyi")
    if not stub.exists():
        return []
    body = ast.parse(stub.read_text(encoding="utf-8")).body
    lines = [line for line in body if isinstance(line, ast.ImportFrom)]
    short = package.replace("flowsim", "fs", 1)
    rows = [
        f"* ``{short}.{name.asname}``: :py:obj:`{line.module}.{name.name}`"
        for line in lines
        for name in line.names
    ]
    return ["Names for users:", "\n".join(rows)]


def write_pages(app) -> None:
    """Write the pages that have changed, so that the others are not read again."""
    folder = Path(app.srcdir) / FOLDER
    folder.mkdir(exist_ok=True)
    pages = {room: page(room) for room in {module.split(".")[1] for module in modules()}}
    pages["flowsim"] = "\n\n".join([heading("Names", "="), *names_of_users("flowsim"), ""])
    for name, text in pages.items():
        path = folder / f"{name}.rst"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    for path in folder.glob("*.rst"):
        if path.stem not in pages:
            path.unlink()


def setup(app) -> dict[str, bool]:
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", lambda *given: replace(given[-1]))
    return {"parallel_read_safe": True}


def replace(lines: list[str]) -> None:
    """Rewrite a docstring in place; that of a plain value is the one of its type, and left out."""
    own = any(lines) and lines[0] not in BUILTINS
    lines[:] = [*as_rst(lines), ""] if own else []
