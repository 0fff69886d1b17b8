"""One reader for the JSON files of a model folder: bounded, and one line of error."""

from pathlib import Path

import pytest

from mlx_vlm_pipes.errors import ConfigError, ProcessorError
from mlx_vlm_pipes.hf_config import read_config
from mlx_vlm_pipes.json_files import MAX_JSON_BYTES, parse_json, read_json


def test_a_huge_config_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)  # sparse
    with pytest.raises(ConfigError, match="expected at most"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"{", "broken JSON"),
        (b"[]", "JSON is a list, expected an object"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"a": "\\ud800"}', "broken JSON"),
        (b"\xff", "broken JSON"),
    ],
)
def test_what_is_no_object_is_one_line(raw: bytes, words: str) -> None:
    with pytest.raises(ProcessorError, match=words) as caught:
        parse_json(raw, Path("x.json"), ProcessorError, unique=True)
    assert "x.json" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_no_file_is_none_and_doubles_may_pass(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none.json", ConfigError) is None
    assert parse_json(b'{"a": 1, "a": 2}', Path("x"), ConfigError) == {"a": 2}
