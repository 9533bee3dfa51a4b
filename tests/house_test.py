"""The house rules that a machine can check (CONTRIBUTING.md says why they are rules)."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
CODE = ("hybridlm", "experiments", "configs", "tests")
LONGEST_FILE = 400
LONGEST_FUNCTION = 80
# Written so that this file does not match itself.
OPEN_ENDS = re.compile("|".join((r"\bTO" r"DO\b", r"\bFIX" r"ME\b", r"\bXX" r"X\b")))
SUPPRESSION = re.compile(r"#\s*(?:no" r"qa|type:\s*ignore|pragma:)")
MACHINE_PATH = re.compile(r"(?<![\w.>*}])/(?:home|root|work|Users|opt)/")
TEXT = {".py", ".md", ".toml", ".in", ".yaml", ".json", ".ipynb", ""}
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: str) -> list[pathlib.Path]:
  return [ROOT / "setup.py"] + sorted(p for name in folders for p in (ROOT / name).rglob("*.py"))


def documents() -> list[pathlib.Path]:
  found = [*ROOT.glob("*"), *(ROOT / ".ci").glob("*")]
  for name in (*CODE, "docs", "third_party"):
    found += (ROOT / name).rglob("*")
  return sorted(p for p in found if p.is_file() and p.suffix in TEXT)


def tree(path: pathlib.Path) -> ast.Module:
  return ast.parse(path.read_text("utf-8"), str(path))


def where(path: pathlib.Path, line: int) -> str:
  return f"{path.relative_to(ROOT)}:{line}"


def matches(pattern: re.Pattern, paths: list[pathlib.Path]) -> list[str]:
  return [
    where(path, number)
    for path in paths
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
    if pattern.search(line)
  ]


def too_long(module: ast.Module) -> list[tuple[int, str, int]]:
  """Returns line, name and length of every function over the limit."""
  found = []
  for node in ast.walk(module):
    if isinstance(node, FUNCTION):
      length = node.end_lineno - node.lineno + 1
      if length > LONGEST_FUNCTION:
        found.append((node.lineno, node.name, length))
  return found


def undocumented(module: ast.Module) -> list[tuple[int, str]]:
  """Returns line and name of every public top-level function or class without a docstring."""
  return [
    (node.lineno, node.name)
    for node in module.body
    if isinstance(node, FUNCTION | ast.ClassDef)
    and not node.name.startswith("_")
    and not ast.get_docstring(node)
  ]


def test_files_stay_under_the_length_limit():
  lengths = {path: len(path.read_text("utf-8").splitlines()) for path in sources(*CODE)}
  assert not {where(p, n): n for p, n in lengths.items() if n >= LONGEST_FILE}


def test_functions_stay_under_the_length_limit():
  long = [(where(path, line), *rest) for path in sources(*CODE)
          for line, *rest in too_long(tree(path))]
  assert not long


def test_the_length_check_sees_a_long_function():
  body = "\n".join(["def long():"] + ["  x = 1"] * LONGEST_FUNCTION)
  assert too_long(ast.parse(body)) == [(1, "long", LONGEST_FUNCTION + 1)]


def test_every_public_function_of_the_library_says_what_it_returns():
  bare = [(where(path, line), name) for path in sources("hybridlm", "experiments")
          for line, name in undocumented(tree(path))]
  assert not bare


def test_nothing_is_left_open():
  assert not matches(OPEN_ENDS, [p for p in documents() if p.suffix != ".json"])


def test_no_lint_is_silenced_in_place():
  assert not matches(SUPPRESSION, sources(*CODE))


def test_no_path_of_a_machine_is_in_the_tree():
  assert not matches(MACHINE_PATH, documents())


@pytest.mark.parametrize("folder", CODE[:3])
def test_every_folder_of_code_is_a_package(folder):
  homes = {path.parent for path in (ROOT / folder).rglob("*.py")}
  assert not [home for home in homes if not (home / "__init__.py").is_file()]


def test_ci_runs_the_test_command_of_the_readme():
  commands = re.findall(r"(?<=/)python (-m pytest[^\n`]*)", (ROOT / "README.md").read_text("utf-8"))
  assert len(set(commands)) == 1
  assert f"step python {commands[0].strip()}\n" in (ROOT / ".ci" / "run").read_text("utf-8")
