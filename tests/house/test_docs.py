"""The documentation says what is there: links, names and code blocks of docs/ and README.md, and
the doctests."""

import ast
import doctest
import importlib
import importlib.util
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flowsim as fs
from tests.house.test_architecture import ROOMS

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(p for p in [*DOCS.glob("*.md"), *ROOT.glob("*.md")] if p.is_file())
MODULES = sorted(m.name for m in pkgutil.walk_packages(fs.__path__, "flowsim."))
# A block opens with ```python, ```{code-cell} python or ```{code-block} python; options start with
# a colon.
BLOCK = re.compile(
    r"^```(?:\{code-(?:cell|block)\} )?i?python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL
)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")

pytestmark = pytest.mark.skipif(
    not DOCS.is_dir(), reason="the documentation is not part of this installation"
)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[str]:
    found = BLOCK.findall(text(page))
    return [
        "\n".join(line for line in block.splitlines() if not line.startswith(":"))
        for block in found
    ]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as MyST and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text(page)), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", text(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: no {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: no heading for {target}"


def test_toctree_lists_every_page() -> None:
    tree = re.search(r"```\{toctree\}\n(.*?)```", text(DOCS / "index.md"), re.DOTALL)
    assert tree is not None
    entries = {
        line.strip() for line in tree[1].splitlines() if line.strip() and not line.startswith(":")
    }
    assert entries == {page.stem for page in DOCS.glob("*.md")} - {"index"}


@each_page
def test_python_blocks_compile(page: Path) -> None:
    for block in blocks(page):
        compile(block, page.name, "exec")


@each_page
def test_names_exist(page: Path) -> None:
    """Every dotted name that starts with ``fs`` or ``flowsim``, in code and in prose."""
    for name in set(re.findall(r"\b(?:fs|flowsim)((?:\.[A-Za-z_]\w*)+)", text(page))):
        if name.endswith((".toml", ".py")):
            continue
        found = fs
        for part in name[1:].split("."):
            if not hasattr(found, part):
                importlib.import_module(f"{found.__name__}.{part}")
            found = getattr(found, part)


@each_page
def test_keyword_arguments_exist(page: Path) -> None:
    """Calls ``fs.name(…, keyword=…)`` use keywords that the function has."""
    from inspect import signature

    for block in blocks(page):
        for call in (node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            if re.fullmatch(r"fs(\.\w+)+", name):
                function = fs
                for part in name.split(".")[1:]:
                    function = getattr(function, part)
                known = signature(function).parameters
                unknown = {k.arg for k in call.keywords if k.arg} - set(known)
                assert not unknown, f"{page.name}: {name} has no {', '.join(sorted(unknown))}"


def test_public_names_are_documented() -> None:
    everything = "\n".join(text(page) for page in PAGES)
    missing = [name for name in fs.__all__ if not re.search(rf"\b{name}\b", everything)]
    assert not missing


def test_the_design_lists_every_room_in_order() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", text(DOCS / "design.md"), re.MULTILINE)
    listed = [set(re.findall(r"\w+", row)) for row in rows]
    assert [floor for floor in ROOMS if floor not in listed] == []
    assert [floor for floor in listed if floor in ROOMS] == ROOMS


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0


def api_pages():
    """The extension that makes the API pages."""
    spec = importlib.util.spec_from_file_location("api_pages", DOCS / "api_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_api_pages_hold_every_module_once() -> None:
    rooms = {name.split(".")[1] for name in MODULES}
    shown = "".join(api_pages().page(room) for room in sorted(rooms))
    assert sorted(re.findall(r"automodule:: (\S+)", shown)) == MODULES


def test_docstrings_become_text_with_links_and_formulas_as_they_stand() -> None:
    plain = ["By `Trajectory.save`, in ``w``, ‖g‖_* of", "", "    w ← w − η*g", "      `more`:", ""]
    text, *laid_out = api_pages().as_rst(plain)
    assert "<flowsim.run.trajectory.Trajectory.save>`" in text
    assert "``w``" in text
    assert r"‖g‖\_\*" in text
    assert laid_out == ["", "::", "", "        w ← w − η*g", "          more:"]


@pytest.mark.slow
def test_documentation_builds(tmp_path: Path) -> None:
    """A build from a clean tree, all cells executed, with no warning."""
    for package in ("sphinx", "myst_nb", "pydata_sphinx_theme", "ipykernel"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-E",
        "-d",
        str(tmp_path / "trees"),
    ]
    done = subprocess.run(
        [*command, "-b", "html", str(DOCS), str(tmp_path / "html")],
        env=os.environ | {"MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert [*(tmp_path / "html" / "_images").glob("*.png")]  # also where MPLBACKEND is set


def test_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    code = "\n".join(
        re.findall(
            r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
        )
    )
    (tmp_path / "readme.py").write_text(
        code + "\nassert {s.name for s in run.statuses + more.statuses} == {'DONE'}\n"
    )
    settings = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "readme.py"], cwd=tmp_path, env=settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
