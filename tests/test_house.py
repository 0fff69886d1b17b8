"""The house keeps its rules: arrows point down, rooms keep to themselves, nothing is too long."""

import ast
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from mlx_vlm_pipes.registry import NAMES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mlx_vlm_pipes"
LAYERS = (ROOT / "ARCHITECTURE.md").read_text().split("```layers\n")[1].split("```")[0].splitlines()
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row.split()}
# what configurations of other rooms embed
SHARED = {"llama3.model_config", "llama3.facts", "qwen3.model_config"}


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, in functions and for types too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module or ""


def own_imports(path: Path) -> list[list[str]]:
    """Those of this package, as parts below it."""
    names = (name.split(".") for name in imports(path))
    return [parts[1:] for parts in names if parts[0] == "mlx_vlm_pipes" and len(parts) > 1]


def files(*folders: str) -> list[Path]:
    found = chain.from_iterable((PACKAGE / folder).rglob("*.py") for folder in folders or ("",))
    return [path for path in found if path != PACKAGE / "__init__.py"]  # it loads on demand


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_arrows_point_down() -> None:
    assert set(map(part_of, files())) == set(RANK)
    wrong = {
        f"{part_of(path)} -> {other}"
        for path in files()
        for other, *_ in own_imports(path)
        if other != part_of(path) and RANK[other] <= RANK[part_of(path)]
    }
    assert not wrong


def test_nothing_from_processing_down_imports_mlx() -> None:
    low = [path for path in files() if RANK[part_of(path)] >= RANK["processing"]]
    assert not [path for path in low if any(n.split(".")[0] == "mlx" for n in imports(path))]


def test_no_room_imports_another() -> None:
    rooms = {folder.name for folder in (PACKAGE / "architectures").iterdir() if folder.is_dir()}
    wrong = {
        f"{path.relative_to(PACKAGE)} -> {'.'.join(rest)}"
        for path in files()
        for part, *rest in own_imports(path)
        if part == "architectures" and rest[0] in rooms - {path.parent.name}
        if part_of(path) != "architectures" or ".".join(rest) not in SHARED
    }
    assert not wrong


def test_engine_and_nn_name_no_architecture() -> None:
    for path in files("engine", "nn"):
        assert not {part for part, *_ in own_imports(path)} & {"architectures", "registry", "facts"}
        constants = (
            n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)
        )
        assert not {node.value for node in constants} & NAMES.keys(), path


def test_nothing_is_too_long() -> None:
    others = ((ROOT / folder).rglob("*.py") for folder in ("tests", "tools", "benchmarks"))
    for path in chain(files(), *others):
        text = path.read_text()
        assert len(text.splitlines()) <= 500, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
                assert len(lines) <= 50, f"{path}: {node.name}"
