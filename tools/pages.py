"""What the site takes from the code while mkdocs builds it (`hooks` of mkdocs.yml).

A line `<!-- from the code: NAME -->` of a page becomes what the function of that name in PARTS
says. The notebooks of examples/ become pages of their own.
"""

from __future__ import annotations

import base64
import functools
import html
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import mlx_vlm_pipes  # noqa: E402
from mlx_vlm_pipes import errors  # noqa: E402
from mlx_vlm_pipes.__main__ import COMMANDS  # noqa: E402
from mlx_vlm_pipes.generate import build_parser  # noqa: E402
from mlx_vlm_pipes.options import (  # noqa: E402
    ALIASES,
    ELSEWHERE,
    OPTIONS,
    GenerateOptions,
    Option,
    PromptOptions,
    SamplingOptions,
    default,
)

MARK = re.compile(r"^<!-- from the code: (\w+) -->$", re.MULTILINE)
PICTURE = re.compile(r"\]\(((?:\.\./)*)\.\./examples/images/")
FIRST = ("load", "Pipeline", "GenerationResult")
KINDS = (
    ("How a prompt is read", PromptOptions),
    ("How the next token is chosen, and where the answer ends", SamplingOptions),
    ("What an answer is held to, and what is told of it", GenerateOptions),
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs: a page's text with its parts from the code; examples/ is a folder of the site."""
    markdown = PICTURE.sub(r"](\1examples/images/", markdown)
    return MARK.sub(lambda found: PARTS[found[1]](), markdown)


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: the notebooks and the pictures of examples/ beside the pages that are there."""
    from mkdocs.structure.files import File

    for path in sorted((ROOT / "examples" / "images").iterdir()):
        uri = f"examples/images/{path.name}"
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    for path in notebooks():
        uri = f"notebooks/{path.stem}.md"
        files.append(File.generated(config, uri, content=notebook_page(path)))
    return files


def table(heads: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def options() -> str:
    """A table for each class of options: every option, with its default, flag and values."""
    parts, seen = [], set()
    for title, kind in KINDS:
        names = [name for name in OPTIONS if name in kind.__annotations__ and name not in seen]
        seen.update(names)
        rows = ((_named(OPTIONS[name]), _given(OPTIONS[name]), OPTIONS[name].expected,
                 OPTIONS[name].help) for name in names)  # fmt: skip
        heads = ("option, command's flag", "default", "values", "meaning")
        parts.append(f"### {title}\n\n" + table(heads, rows))
    return "\n".join(parts)


def _named(option: Option) -> str:
    flag = f"--{option.name.replace('_', '-')}"
    has_flag = flag in _flags() and option.name != "adapter"  # the command's is a folder to load
    return f"`{option.name}`<br>`{flag}`" if has_flag else f"`{option.name}`"


@functools.cache
def _flags() -> list[str]:
    return re.findall(r"--[\w-]+", build_parser().format_help())


def _given(option: Option) -> str:
    return f"`{default(option.name)!r}`"


def aliases() -> str:
    """The names of others that are taken, and those that are answered with a hint."""
    rows = ((f"`{name}`", f"`{own}`") for name, own in sorted(ALIASES.items()))
    hints = ((f"`{name}`", hint) for name, hint in sorted(ELSEWHERE.items()))
    taken = table(("also taken", "the same as"), rows)
    return taken + "\n" + table(("not taken", "what there is"), hints)


def error_classes() -> str:
    """The tree of exceptions, each with the first sentence of what it is for."""

    def lines(kind: type, depth: int) -> Iterator[str]:
        about = inspect.cleandoc(kind.__doc__ or "").splitlines()[0]
        yield f"{'    ' * depth}- `{kind.__name__}`: {about}"
        for child in kind.__subclasses__():
            if child.__module__.startswith("mlx_vlm_pipes."):
                yield from lines(child, depth + 1)

    return "\n".join([*lines(errors.PipesError, 0), *lines(errors.PipesWarning, 0)]) + "\n"


def commands() -> str:
    """The help of every command, as a terminal of 96 columns shows it."""
    os.environ["COLUMNS"], parts = "96", []
    for name in COMMANDS:
        parser = import_module(f"mlx_vlm_pipes.{name}").build_parser()
        parts.append(f"## {name}\n\n```text\n{parser.format_help()}```\n")
    return "\n".join(parts)


def python() -> str:
    """Every public name of the package, from signatures and docstrings; what most need first."""
    parts = []
    for name in sorted(mlx_vlm_pipes.__all__, key=_place):
        value = getattr(mlx_vlm_pipes, name)
        if not (inspect.isclass(value) and issubclass(value, (Exception, Warning))):
            parts.append("\n".join(described(name, value)))
    return "\n\n".join(parts)


def _place(name: str) -> tuple[int, str]:
    return (FIRST.index(name) if name in FIRST else len(FIRST), name)


def described(name: str, value: Any) -> Iterator[str]:
    yield f"## {name}\n"
    if name == "GenerateOptions":
        yield "The options of a request: [Options and errors](../guide/options-and-errors.md).\n"
        return
    if not inspect.isclass(value):
        yield signature(name, value)
        yield prose(value.__doc__)
        return
    if is_dataclass(value):
        shown = [
            f"    {field.name}: {_typed(field.type)}"
            + ("" if field.default is MISSING else f" = {field.default!r}")
            for field in fields(value)
        ]
        yield "```text\n" + f"{name}\n" + "\n".join(shown) + "\n```\n"
    yield prose(value.__doc__)
    for method, member in vars(value).items():
        told = member.fget if isinstance(member, property) else member
        if method.startswith("_") or not inspect.isfunction(told) or not told.__doc__:
            continue
        yield f"### {name}.{method}\n"
        if not isinstance(member, property):
            yield signature(method, member)
        yield prose(told.__doc__.split("\n\nOptions:\n")[0])


def _typed(kind: Any) -> str:
    return kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))


def signature(name: str, function: Any) -> str:
    """A call with its own arguments; the options of a request by their name alone."""
    own = inspect.signature(function)
    hidden = [p for p in own.parameters.values() if p.name in OPTIONS and p.kind is p.KEYWORD_ONLY]
    kept = [p for p in own.parameters.values() if p not in hidden and p.name != "self"]
    shown = [re.sub(r": '([^']*)'", r": \1", str(parameter)) for parameter in kept]
    stars = [i for i, p in enumerate(kept) if p.kind is p.KEYWORD_ONLY]
    if stars:
        shown.insert(stars[0], "*")
    if hidden:
        shown.append("**options")
    gives = own.return_annotation
    given = "" if gives in (own.empty, None, "None") else f" -> {_typed(gives)}"
    text = f"{name}({', '.join(shown)}){given}"
    if len(text) > 90:
        text = f"{name}(\n    " + ",\n    ".join(shown) + f",\n){given}"
    return f"```text\n{text}\n```\n"


def prose(docstring: str | None) -> str:
    """A docstring as Markdown: its paragraphs, with what Markdown would read as its own escaped."""
    text = inspect.cleandoc(docstring or "")
    pieces = re.split(r"(`[^`]*`)", text)
    plain = (p if p.startswith("`") else re.sub(r"([*<])", r"\\\1", p) for p in pieces)
    said = "".join(plain)
    return (
        re.sub(r"^(Args|Raises|Returns|Source): ", r"\n**\1:** ", said, flags=re.MULTILINE) + "\n"
    )


def results() -> str:
    """benchmarks/RESULTS.md without its title, its headings a level lower."""
    return included(ROOT / "benchmarks" / "RESULTS.md")


def changes() -> str:
    return included(ROOT / "CHANGELOG.md").replace("\n### ", "\n## ", 1)


def included(path: Path) -> str:
    body = path.read_text(encoding="utf-8").split("\n", 1)[1]
    return re.sub(r"^##", "###", body, flags=re.MULTILINE)


def notebooks() -> list[Path]:
    return sorted(
        (ROOT / "examples").glob("*.ipynb"), key=lambda path: int(path.stem.split("_")[0])
    )


def notebook_list() -> str:
    """A line for each notebook: its title, and the sentence below it."""
    lines = []
    for path in notebooks():
        first = cells(path)[0]
        title, _, rest = "".join(first["source"]).strip().partition("\n")
        about = rest.strip().split("\n\n")[0].replace("\n", " ")
        lines.append(f"- [{title.lstrip('# ')}](notebooks/{path.stem}.md): {linked(about, '')}")
    return "\n".join(lines) + "\n"


def cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def notebook_page(path: Path) -> str:
    """A notebook as it is stored: its text, code, and what the code printed and drew."""
    parts = []
    for cell in cells(path):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code":
            parts.append(f"```python\n{source}\n```")
            parts += [shown for output in cell["outputs"] if (shown := output_of(output))]
    page = linked("\n\n".join(parts), "../")
    return f"{page}\n\nThis page is `examples/{path.name}` with its stored outputs.\n"


def linked(text: str, root: str) -> str:
    """A notebook's links as the site has them; root: the way from the page to the site's first."""
    text = re.sub(r"\]\((\w+)\.ipynb\)", rf"]({root}notebooks/\1.md)", text)
    text = re.sub(r'src="images/', f'src="{root}examples/images/', text)
    text = re.sub(r"\]\(\.\./docs/", f"]({root}", text)
    return re.sub(r"\]\(\.\./(\w+\.md)\)", rf"]({repository()}/blob/main/\1)", text)


def repository() -> str:
    """Its address, from pyproject.toml (tomllib is not in Python 3.10)."""
    found = re.search(r'^Homepage = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def output_of(output: dict[str, Any]) -> str:
    """One output: a picture, a page of HTML, or text."""
    if output["output_type"] == "stream":
        return fenced("".join(output["text"]))
    data = output.get("data", {})
    if "image/png" in data:
        encoded = "".join(data["image/png"]).replace("\n", "")
        base64.b64decode(encoded, validate=True)
        alt = html.escape(output["metadata"].get("image/png", {}).get("alt", "what the cell draws"))
        return f'<img alt="{alt}" src="data:image/png;base64,{encoded}">'
    if "text/html" in data:
        return f'<div class="output">{"".join(data["text/html"])}</div>'
    return fenced("".join(data.get("text/plain", "")))


def fenced(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


PARTS: dict[str, Callable[[], str]] = {
    "options": options,
    "aliases": aliases,
    "error_classes": error_classes,
    "commands": commands,
    "python": python,
    "results": results,
    "changes": changes,
    "notebook_list": notebook_list,
}
