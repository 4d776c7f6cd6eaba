"""The form of the code: how much is said, how densely, how wide, and what imports what.

Tokens are counted without comments, docstrings, newlines and indentation: lines can be
packed, tokens cannot."""

import ast
import io
import tokenize
from functools import cache

from pytest import mark

from conftest import ROOT

ORDER = ["unet", "ddpm", "train_ddpm", "vdu", "evaluate", "sd_unlearn"]
SOURCES = [ROOT / f"{name}.py" for name in ORDER]
TESTS = sorted((ROOT / "tests").glob("*.py"))
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER)


def nodes(path, *kinds):
    """A file's syntax: the nodes of some kinds."""
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, kinds)]


@cache
def measure(path):
    """{line: tokens of code on it}, the lines that are prose, how many comments."""
    prose = set()
    for node in nodes(path, ast.Module, ast.ClassDef, ast.FunctionDef):
        if ast.get_docstring(node):
            prose.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))

    counts = {}
    comments = 0
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        line = token.start[0]
        if token.type == tokenize.COMMENT:
            comments += 1
        if token.line.strip().startswith("#"):
            prose.add(line)
        elif token.type not in LAYOUT and line not in prose:
            counts[line] = counts.get(line, 0) + 1
    return counts, prose, comments


def counts_of(paths):
    """Tokens of each code line of several files."""
    return [n for path in paths for n in measure(path)[0].values()]


def test_the_sources_are_these_six():
    assert {*ROOT.glob("*.py")} == {*SOURCES}


@mark.parametrize("paths, limit", [(SOURCES, 25_500), (TESTS, 24_000)])
def test_little_is_said(paths, limit):
    assert sum(counts_of(paths)) <= limit


ALL = [(SOURCES, 10.3, 0.08), (TESTS, 11, 0.10)]
EACH = [([path], 11, 0.12) for path in SOURCES]


@mark.parametrize("paths, per_line, crowded", ALL + EACH)
def test_lines_are_short(paths, per_line, crowded):
    counts = counts_of(paths)
    over_20 = [n for n in counts if n > 20]

    assert sum(counts) <= per_line * len(counts)
    assert len(over_20) <= crowded * len(counts)


@mark.parametrize("path", SOURCES + TESTS, ids=lambda path: path.stem)
def test_one_statement_assigns_one_thing(path):
    for node in nodes(path, ast.Assign):
        several = isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
        assert not several, ast.unparse(node)


@mark.parametrize("path", SOURCES + TESTS, ids=lambda path: path.stem)
def test_functions_are_short(path):
    limit = 400 if path in SOURCES else 350
    counts, _, _ = measure(path)
    for node in nodes(path, ast.FunctionDef):
        if node.name != "parser":
            lines = range(node.lineno, node.end_lineno + 1)
            assert sum(counts.get(i, 0) for i in lines) <= limit, node.name


def test_every_fifth_line_of_code_is_commented():
    comments = sum(measure(path)[2] for path in SOURCES)
    assert comments >= len(counts_of(SOURCES)) / 5


@mark.parametrize("path", SOURCES + TESTS, ids=lambda path: path.stem)
def test_no_line_is_too_wide(path):
    _, prose, _ = measure(path)
    for i, line in enumerate(path.read_text().splitlines(), 1):
        limit = 88 if i in prose else 100
        assert len(line) <= limit, f"line {i}"


@mark.parametrize("path", SOURCES, ids=ORDER)
def test_imports_are_a_straight_line_and_stand_at_the_top(path):
    later = ORDER[ORDER.index(path.stem):]
    for node in nodes(path, ast.Import, ast.ImportFrom):
        names = [alias.name for alias in node.names]
        names.append(getattr(node, "module", None))

        assert not set(names) & set(later)
        assert node.col_offset == 0
