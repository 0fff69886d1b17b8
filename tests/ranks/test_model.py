"""A model on several ranks: the numbers of one process, and what each rank holds and reads."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_vlm_pipes.ranks import ALONE
from mlx_vlm_pipes.weights import load_weights
from tests.device import bar
from tests.engine.models import write_llama
from tests.fixtures_helper import FIXTURES, SAME_PILLOW, cases
from tests.gguf_file import write_case
from tests.ranks.launched import launch
from tests.ranks.rank import Job, run
from tests.ranks.variants import MLX_FORMATS, pack, with_all_heads, write_lora

LOGITS_BAR = bar(2e-5)  # of the largest logit, as one process has (test_against_transformers)
# one of each family, and stacked projections
FAMILIES = [
    "llama-tied", "phi3-longrope", "olmo", "idefics3", "pixtral", "internvl-qwen3", "qwen2vl",
    "qwen25vl", "qwen3vl",
]  # fmt: skip
IDS = [[5, 9, 17, 3, 44, 8, 21]]


def ask(jobs: list[Job], size: int, folder: Path, timeout: float = 300) -> list[list[Any]]:
    """What each of `size` ranks says of each job: [job][rank]."""
    request = folder / "request.json"
    request.write_text(json.dumps([asdict(job) for job in jobs]))
    reports = launch(size, "tests.ranks.rank", [str(request)], folder, timeout)
    return [list(said) for said in zip(*reports, strict=True)]


def require_reference(job: Job, ranks: list[dict[str, Any]]) -> None:
    assert all(rank["difference"] < LOGITS_BAR for rank in ranks), job.folder
    assert not any(rank["wrong"] for rank in ranks), job.folder


def test_two_ranks_have_the_numbers_of_transformers(tmp_path: Path) -> None:
    """3 KV heads over 2 ranks, a picture, stacked projections with 1 KV head (refused)."""
    names = ["llama-stop", "phi3-longrope"] + ["qwen3vl"] * SAME_PILLOW
    jobs = [Job(str(FIXTURES / name), str(FIXTURES / name), large_vocabulary=300) for name in names]
    jobs[-1].tower_fails = SAME_PILLOW
    refused = Job(str(FIXTURES / "phi3-partial"))
    *answers, refusals = ask([*jobs, refused], 2, tmp_path)
    for job, ranks in zip(jobs, answers, strict=True):
        require_reference(job, ranks)
        assert [rank["devices"] for rank in ranks] == [2, 2]
    assert [rank["kv_heads"] for rank in answers[0]] == [1, 2]
    assert answers[0][0]["signal_buffers"] == [[0], [0]]
    if SAME_PILLOW:
        assert [rank["failure"] for rank in answers[-1]] == [
            "RuntimeError: out of memory",
            "MediaError: rank 0 could not encode the pictures; its own message says why",
        ]
    assert {rank["refused"] for rank in refusals} == {
        "1 KV heads do not divide among 2 devices; use 1"
    }


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_every_family_has_the_numbers_of_transformers(size: int, tmp_path: Path) -> None:
    """On 2 ranks every fixture; on 3 one of each family, its KV heads repeated: 4 are 1, 1 and 2.

    With the output head cut and joined.
    """
    jobs = []
    for fixture in cases():
        if size == 3 and fixture.name not in FAMILIES:
            continue
        folder = with_all_heads(fixture.name, tmp_path / fixture.name) if size == 3 else fixture
        jobs.append(Job(str(folder), str(fixture), large_vocabulary=100))
    for job, ranks in zip(jobs, ask(jobs, size, tmp_path, timeout=560), strict=True):
        if "refused" in ranks[0]:
            assert {rank["refused"] for rank in ranks} == {
                "1 KV heads do not divide among 2 devices; use 1"
            }
        else:
            require_reference(job, ranks)


@pytest.mark.slow
def test_packed_weights_are_cut_in_whole_groups(tmp_path: Path) -> None:
    """3 KV heads over 2 ranks, and an MLP of 192 in groups of 64: 64 and 128 columns.

    Compared with one process: every packing has numbers of its own.
    """
    plain = write_llama(tmp_path / "plain", heads=6, kv_heads=3, hidden=128)
    jobs = [Job(str(plain), prompts=IDS, large_vocabulary=100)]
    for form in [*(set(MLX_FORMATS) - {"coarse"}), "gptq", "awq", "int8"]:
        folder = pack(plain, tmp_path / form, form)
        jobs.append(Job(str(folder), prompts=IDS, large_vocabulary=100))
    jobs.append(Job(str(plain), prompts=IDS, kv_bits=8))
    jobs.append(Job(str(write_case(tmp_path / "q4.gguf", "llama-tied", "Q4_0")), prompts=IDS))
    for job, ranks in zip(jobs, ask(jobs, 2, tmp_path), strict=True):
        alone = run(replace(job, large_vocabulary=None), ALONE)
        assert [rank.get("refused") for rank in ranks] == [None, None], job.folder
        want = np.array(alone["last"])
        for rank in ranks:
            assert np.abs(np.array(rank["last"]) - want).max() < LOGITS_BAR * np.abs(want).max()
            assert rank["tokens"] == alone["tokens"], job.folder


@pytest.mark.slow
def test_adapters_are_cut_with_the_linears_that_they_change(tmp_path: Path) -> None:
    """All seven linears; DoRA where a rank has whole rows; joined projections as Phi-3 has them."""
    at = "model.layers.1."
    plain = write_llama(tmp_path / "plain", heads=6, kv_heads=3, hidden=128)
    into, out = {f"{at}self_attn.o_proj": (384, 128)}, {f"{at}self_attn.q_proj": (128, 384)}
    out |= {f"{at}self_attn.{name}_proj": (128, 192) for name in "kv"}
    out |= {f"{at}mlp.{name}_proj": (128, 192) for name in ("gate", "up")}
    every = write_lora(tmp_path / "every", into | out | {f"{at}mlp.down_proj": (192, 128)})
    dora = write_lora(tmp_path / "dora", out, dora=True)
    phi3 = with_all_heads("phi3-longrope", tmp_path / "phi3")
    shapes = parameter_shapes_of(phi3, ("self_attn.qkv_proj", "mlp.gate_up_proj"))
    joined = write_lora(tmp_path / "joined", shapes)
    wrong = write_lora(tmp_path / "wrong", into, dora=True)
    both = [str(every), str(dora)]
    jobs = [Job(str(plain), None, IDS, adapters=both, adapter=name) for name in ("every", "dora")]
    jobs += [Job(str(phi3), None, IDS, adapters=[str(joined)], adapter="joined")]
    asked = [*jobs, Job(str(plain), adapters=[str(wrong)])]
    *answers, refusals = ask(asked, 2, tmp_path)
    for job, ranks in zip(jobs, answers, strict=True):
        alone, base = run(job, ALONE), run(replace(job, adapter="", adapters=[]), ALONE)
        want = np.array(alone["last"])
        bound = LOGITS_BAR * np.abs(want).max()
        assert np.abs(np.array(base["last"]) - want).max() > 100 * bound
        for rank in ranks:
            assert np.abs(np.array(rank["last"]) - want).max() < bound, job.adapter
            assert rank["tokens"] == alone["tokens"]
    for rank in refusals:
        assert "adapter 'wrong' is DoRA on " in rank["refused"]


def parameter_shapes_of(folder: Path, names: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of linears of a folder, by the end of their names."""
    stored = load_weights(sorted(folder.glob("*.safetensors")))
    shapes = {name.removesuffix(".weight"): handle.data().shape for name, handle in stored.items()}
    return {name: (s[1], s[0]) for name, s in shapes.items() if name.endswith(names)}
