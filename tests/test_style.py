"""The form of the code: widths, its size in tokens, and imports in a straight line."""

import ast
import io
import tokenize

import pytest

from conftest import ROOT

ORDER = ["unet", "ddpm", "train_ddpm", "vdu", "evaluate", "sd_unlearn"]
SOURCES = [ROOT / f"{name}.py" for name in ORDER]
TESTS = sorted((ROOT / "tests").glob("*.py"))


def prose_lines(text):
    """Numbers of the lines that are comments alone, or belong to a docstring."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line.strip().startswith("#"):
            yield token.start[0]
    for node in ast.walk(ast.parse(text)):
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef
        if isinstance(node, kinds) and ast.get_docstring(node):
            yield from range(node.body[0].lineno, node.body[0].end_lineno + 1)


def tokens_of(path):
    """How many tokens of code a file has, without comments, docstrings and layout. No
    packing of lines changes it."""
    text = path.read_text()
    prose = set(prose_lines(text))
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
              tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(t.type not in layout and t.start[0] not in prose for t in tokens)


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=lambda p: p.stem)
def test_columns(path):
    lines, prose = path.read_text().splitlines(), set(prose_lines(path.read_text()))
    wide = [i for i, line in enumerate(lines, 1) if len(line) > (88 if i in prose else 100)]
    assert not wide, f"{path.name}: too wide are lines {wide}"


def test_the_code_is_short():
    assert {*ROOT.glob("*.py")} == {*SOURCES}
    assert sum(map(tokens_of, SOURCES)) <= 26_934
    assert sum(map(tokens_of, TESTS)) <= 27_000


@pytest.mark.parametrize("path", SOURCES, ids=ORDER)
def test_imports_are_a_straight_line_and_stand_at_the_top(path):
    tree, later = ast.parse(path.read_text()), ORDER[ORDER.index(path.stem):]
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    for node in imports:
        names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
        assert not set(names) & set(later) and node in tree.body, ast.unparse(node)
