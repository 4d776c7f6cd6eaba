"""The form of the code: widths, its length, and imports in a straight line."""

import ast
import io
import tokenize

import pytest

from conftest import ROOT

ORDER = ["unet", "ddpm", "train_ddpm", "vdu", "evaluate", "sd_unlearn"]
SOURCES = [ROOT / f"{name}.py" for name in ORDER]


def prose_lines(text):
    """Numbers of the lines that are comments alone, or belong to a docstring."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line.strip().startswith("#"):
            yield token.start[0]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node,
                      ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            yield from range(node.body[0].lineno, node.body[0].end_lineno + 1)


@pytest.mark.parametrize("path", [*SOURCES, *(ROOT / "tests").glob("*.py")], ids=lambda p: p.stem)
def test_columns(path):
    lines, prose = path.read_text().splitlines(), set(prose_lines(path.read_text()))
    wide = [i for i, line in enumerate(lines, 1) if len(line) > (88 if i in prose else 100)]
    assert not wide, f"{path.name}: too wide are lines {wide}"


def test_readmes_columns():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


def test_the_code_is_short():
    files = sorted(ROOT.glob("*.py"))
    assert files == sorted(SOURCES)
    assert sum(len(path.read_text().splitlines()) for path in files) <= 3200


@pytest.mark.parametrize("path", SOURCES, ids=ORDER)
def test_imports_are_a_straight_line_and_stand_at_the_top(path):
    tree = ast.parse(path.read_text())
    earlier = ORDER[: ORDER.index(path.stem)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node,
                                                ast.ImportFrom) else [a.name for a in node.names]
            assert not [n for n in names if n in ORDER and n not in earlier], ast.unparse(node)
    inside = [n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)]
    assert not [n for n in inside if isinstance(n, ast.Import | ast.ImportFrom)]
