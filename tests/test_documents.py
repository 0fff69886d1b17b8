"""Every block of code in README and on the site is run; what cannot be run is on a short list.

Python blocks of a page share their names, and run in an empty folder that holds FILES. Hub ids
stand for MODELS. A block of `text` behind a block is what that one prints; lines behind `$ ` in a
`console` block are commands, the others what they print. Times and sizes may differ, and a line
`...` stands for any lines; lines behind `> ` are typed into a chat. Blocks titled with another
package's name need it, and are slow. A server runs for the rest of its page, on a port of its own.
A picture of docs/assets that a page's code writes is the stored one.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_vlm_pipes import Pipeline
from mlx_vlm_pipes.loading import BUNDLED

ROOT = Path(__file__).parent.parent
EXAMPLES, FIXTURES = ROOT / "examples", ROOT / "tests" / "fixtures"
# docs/api.md: tests/api/test_docs.py runs its example
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted(page for page in (ROOT / "docs").rglob("*.md") if page.name != "api.md")
# what stands for a hub id; each is of the same architecture
MODELS = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": BUNDLED,
    "mlx-community/Qwen2.5-VL-3B-Instruct-4bit": EXAMPLES / "models" / "tiny-qwen2_5vl",
    "Qwen/Qwen2.5-VL-3B-Instruct": EXAMPLES / "models" / "tiny-qwen2_5vl",
    "OpenGVLab/InternVL3-2B-hf": EXAMPLES / "models" / "tiny-internvl",
    "mistral-community/pixtral-12b": EXAMPLES / "models" / "tiny-pixtral",
    "Qwen/Qwen2-VL-2B-Instruct": FIXTURES / "qwen2vl",
    "Qwen/Qwen3-VL-4B-Instruct": FIXTURES / "qwen3vl",
    "Qwen/Qwen3-4B": Path("text-model"),
    "mlx-community/Llama-3.2-1B-Instruct-4bit": FIXTURES / "llama-tied",
}
# what stands for the reader's own files; ADAPTERS and a PDF of two pages are written beside them
ADAPTERS = ("my-adapter", "other-adapter")
FILES = {
    "examples": EXAMPLES,
    "cat.png": EXAMPLES / "images" / "shapes.png",
    "dog.png": EXAMPLES / "images" / "green_star.png",
    "clip.gif": EXAMPLES / "images" / "moving_circle.gif",
}
# commands that need a network, another machine, an environment of their own or minutes
NOT_RUN = (
    r"pip install .*", r"git clone \S+", r"cd \S+", r"python -m venv \S+", r"source \S+",
    r"pytest( -m \w+)?", r"scripts/check", r"hf auth login", r"hf upload .*",
    r"(MLX_VLM_PIPES_TEST_DEVICE=gpu )?pytest", r"mkdocs (build --strict|serve)",
    r"export [A-Z_0-9]+=\S+",
    r"python (-m )?(tools|tests|benchmarks)\S+.*", r"python -m mlx_vlm_pipes.check --device.*",
    r"mlx\.launch .*",  # tests/distributed
    r"llm .*", r"echo .* > \S+", r".* --host 0\.0\.0\.0 .*",
    r"python -m mlx_vlm\.\w+ .*",  # another package's; test_other_packages_answer_as_shown
)  # fmt: skip
SLOW = ("server.md", "clients.md", "prefixes.md", "performance.md")
SERVED = "127.0.0.1:8080"
# A template that reads what Qwen3's reads, for the text model of the fixtures.
TEMPLATE = """\
{# calls: <tool_call> #}\
{% if tools %}Tools: {% for tool in tools %}\
{{ tool.function.name }} ({{ tool.function.description }})\
{% endfor %}{{ "\\n" }}{% endif %}\
{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant:\
{% if enable_thinking is not defined or enable_thinking %} <think>{% endif %}{% endif %}"""
# what blocks titled so import; they are run where it is installed
CLIENTS = {
    "openai": "openai", "langchain": "langchain_openai", "litellm": "litellm",
    "instructor": "instructor", "pydantic": "pydantic",
}  # fmt: skip
DATA = ("text", "json", "toml", "yaml", "bibtex", "js")  # tests/clients run the js and the yaml
PEERS = {"mlx-vlm": "mlx_vlm", "mlx-lm": "mlx_lm", "transformers": "transformers"}
FIGURES = re.compile(r"\d[\d.,]*(?=( ?(s|ms|MB|GB|tokens/s)\b))")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language and title, its text, and where it stands."""

    language: str
    title: str
    code: str
    line: int
    follows: bool  # nothing but blank lines lies between it and the block before


def blocks(page: Path) -> Iterator[Block]:
    text, end = page.read_text(encoding="utf-8"), 0
    fence = re.compile(r"^( *)```(\S*)([^\n]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
    for found in fence.finditer(text):
        title = re.search(r'title="([^"]*)"', found[3])
        between = text[end : found.start()]
        line = text.count("\n", 0, found.start()) + 2
        code = textwrap.dedent(found[4])
        yield Block(found[2], title[1] if title else "", code, line, not between.strip())
        end = found.end()


def with_local_models(code: str, *, own: bool = True) -> str:
    """The code with folders in place of hub ids; own: False where the names are a server's."""
    for name, folder in MODELS.items() if own else ():
        code = code.replace(name, str(folder))
    return code


def matches(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed: figures aside, `...` for any lines."""
    parts = (re.escape(line) + "\n" for line in without_figures(shown).splitlines())
    pattern = "".join(parts).replace(re.escape("...") + "\n", r"(?:.*\n)*?")
    return re.fullmatch(pattern, without_figures(printed)) is not None


def without_figures(text: str) -> str:
    """Times and sizes, and the numbers of lines that hold nothing else, as # signs."""
    rows = re.compile(r"^ *[\d.,]+(?: +[\d.,]+)+$", re.MULTILINE)
    text = rows.sub(lambda row: " ".join("#" for _ in row[0].split()), text)
    return FIGURES.sub("#", text)


class Reader:
    """Somebody who types what a page says, from top to bottom."""

    def __init__(self, page: Path) -> None:
        self._page = page
        self._names: dict[str, Any] = {"__name__": "__main__"}
        self._printed: str | None = None
        self._server: subprocess.Popen[str] | None = None
        self._address = SERVED

    def read(self) -> None:
        for block in blocks(self._page):
            where = f"{self._page.name}:{block.line}"
            needed = CLIENTS.get(block.title)
            is_missing = needed is not None and find_spec(needed) is None
            if block.language == "python" and (block.title in PEERS or is_missing):
                self._printed = None
            elif block.language == "python":
                self._printed = self._run_python(block, where)
            elif block.language in ("sh", "console"):
                self._type(block, where)
            elif block.language == "text" and block.follows and self._printed is not None:
                assert matches(block.code, self._printed), f"{where}: printed\n{self._printed}"
            else:
                assert block.language in DATA, f"{where}: language?"

        for name in re.findall(r"\]\(\.\./assets/(\w+\.png)\)", self._page.read_text("utf-8")):
            assert_same_picture(Path(name), ROOT / "docs" / "assets" / name)

    def close(self) -> None:
        for value in self._names.values():
            if isinstance(value, Pipeline):
                value.close()
        if self._server is not None:
            self._server.terminate()
            self._server.communicate(timeout=60)

    def _run_python(self, block: Block, where: str) -> str:
        out = io.StringIO()
        code = "\n" * (block.line - 1) + with_local_models(block.code, own=self._server is None)
        code = code.replace(SERVED, self._address)
        with contextlib.redirect_stdout(out):
            exec(compile(code, where, "exec", dont_inherit=True), self._names)
        return out.getvalue()

    def _type(self, block: Block, where: str) -> None:
        """Commands of a `sh` block, or commands and what they print of a `console` block."""
        code = block.code.replace("\\\n", " ")
        if block.language == "sh":
            served = [
                line for line in code.splitlines()
                if "mlx_vlm_pipes.serve" in line and can_run(line)
            ]  # fmt: skip
            self._printed = "".join(
                run_line(line, where) for line in code.splitlines() if line not in served
            )
            for line in served:
                self._serve(line)
            return
        for part in re.split(r"^\$ ", code, flags=re.MULTILINE)[1:]:
            line, _, shown = part.partition("\n")
            if can_run(line):
                typed = re.findall(r"^> (.*)\n", shown, re.MULTILINE)
                printed = run_command(line, where, "\n".join(typed))
                if typed:  # a chat whose input is no terminal leaves signs and blank lines out
                    shown = re.sub(r"^(> .*)?\n", "", shown, flags=re.MULTILINE)
                    printed = re.sub(r"^\n", "", printed, flags=re.MULTILINE)
                assert matches(shown, printed), f"{where}: {line} printed\n{printed}"

    def _serve(self, line: str) -> None:
        """Start the server, on any port, with the models that stand for those it names."""
        words = [sys.executable, *shlex.split(line)[1:], "--port", "0"]
        self._server = subprocess.Popen(
            [f"{word}={MODELS[word]}" if word in MODELS else word for word in words],
            stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert self._server.stderr is not None
        for said in self._server.stderr:
            if found := re.search(r"listening on http://([\d.:]+)/", said):
                self._address = found[1]
            if said.startswith("ready"):
                return


def assert_same_picture(drawn: Path, stored: Path) -> None:
    """Within what another version of the font's renderer does."""
    from PIL import Image

    pair = [np.asarray(Image.open(path).convert("RGB"), np.float32) for path in (drawn, stored)]
    assert pair[0].shape == pair[1].shape, f"{stored.name}: {pair[0].shape}"
    assert np.abs(pair[0] - pair[1]).mean() < 2, stored.name


def can_run(command: str) -> bool:
    return not any(re.fullmatch(pattern, command.strip()) for pattern in NOT_RUN)


def run_line(line: str, where: str) -> str:
    """What the commands of a line print, on both streams. All but NOT_RUN are run."""
    line, _, _ = line.partition("  #")
    commands = [c.strip() for c in line.split(" && ") if c.strip() and not c.startswith("#")]
    return "".join(run_command(c, where) for c in commands if can_run(c))


def run_command(command: str, where: str, typed: str = "") -> str:
    """One of our commands in this process, with what `echo` pipes into it, or what is typed."""
    before, _, command = command.rpartition(" | ")
    words = shlex.split(with_local_models(command))
    if words[:2] == ["python", "-m"]:
        words = words[2:]
    name, *arguments = words
    assert name.startswith(("mlx_vlm_pipes", "mlx-vlm-pipes")), f"{where}: {name} is not ours"
    module = "mlx_vlm_pipes.__main__" if name in ("mlx_vlm_pipes", "mlx-vlm-pipes") else name
    text = before.removeprefix("echo ") or typed
    out = io.StringIO()
    stdin, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(text.encode()))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            status = import_module(module).main(arguments)
    except SystemExit as end:
        status = end.code
    finally:
        sys.stdin = stdin
    assert (status == 2) == ("error:" in out.getvalue()), f"{where}: {command}\n{out.getvalue()}"
    return out.getvalue()


def write_adapter(folder: Path) -> None:
    """A LoRA adapter of the bundled model's decoder, as PEFT saves one."""
    at = "base_model.model.model.text_model.layers.0.self_attn.q_proj"
    drawn = np.random.default_rng(0)
    pair = {"lora_A": (4, 128), "lora_B": (128, 4)}
    folder.mkdir()
    save_file(
        {f"{at}.{part}.weight": drawn.normal(0, 0.1, shape).astype(np.float32)
         for part, shape in pair.items()},
        folder / "adapter_model.safetensors",
    )  # fmt: skip
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with FILES in it, as the current one."""
    for name, file in FILES.items():
        (tmp_path / name).symlink_to(file)
    for name in ADAPTERS:
        write_adapter(tmp_path / name)
    from PIL import Image

    page, second = (Image.open(tmp_path / name).convert("RGB") for name in ("cat.png", "dog.png"))
    page.save(tmp_path / "doc.pdf", save_all=True, append_images=[second])
    text_model = MODELS["Qwen/Qwen3-4B"]
    shutil.copytree(FIXTURES / "qwen3", tmp_path / text_model)
    (tmp_path / text_model / "chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            id=str(page.relative_to(ROOT)),
            marks=[pytest.mark.slow] if page.name in SLOW else [],
        )
        for page in PAGES
    ],
)
def test_every_block_runs(page: Path, desk: Path) -> None:
    reader = Reader(page)
    try:
        reader.read()
    finally:
        reader.close()


PEER_BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{block.line}-{block.title}")
    for page in PAGES
    for block in blocks(page)
    if block.title in PEERS
]
PEER_COMMANDS = [
    pytest.param(block.code, id=f"{page.stem}-{block.line}")
    for page in PAGES
    for block in blocks(page)
    if block.language == "console" and block.code.startswith("$ python -m mlx_vlm.")
]


@pytest.mark.slow
@pytest.mark.parametrize("block", PEER_BLOCKS)
def test_other_packages_answer_as_shown(block: Block, desk: Path) -> None:
    """Their side of a comparison runs as it stands; its last line prints the answer."""
    if find_spec(PEERS[block.title]) is None:
        pytest.skip(f"{block.title} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", with_local_models(block.code)],
        capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("code", PEER_COMMANDS)
def test_mlx_vlm_s_command_says_what_is_shown(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx_vlm")
    monkeypatch.chdir(ROOT)
    command, shown = code.replace("\\\n", " ").removeprefix("$ python").split("\n", 1)
    done = subprocess.run(
        [sys.executable, *shlex.split(command)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == shown.strip()


@pytest.mark.slow
@pytest.mark.reference
def test_transformers_answers_as_readme_says() -> None:
    """30 tokens, and our answer."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    name, picture = str(BUNDLED), str(EXAMPLES / "images" / "shapes.png")
    asked = [{"type": "image", "path": picture}, {"type": "text", "text": "Describe the picture."}]
    theirs = transformers.pipeline("image-text-to-text", model=name, dtype="float32")
    (said,) = theirs(
        text=[{"role": "user", "content": asked}], max_new_tokens=20, return_full_text=False
    )
    prompt = theirs.processor.apply_chat_template(
        [{"role": "user", "content": asked}],
        tokenize=True, return_dict=True, add_generation_prompt=True,
    )  # fmt: skip
    assert said["generated_text"].strip() == "a large red circle above a small blue square"
    assert np.asarray(prompt["input_ids"]).size == 30
