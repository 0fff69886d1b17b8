"""Write what `check --device` compares with: transformers' float32 answers of the bundled model.

    python -m tools.device_references [--model mlx_vlm_pipes/assets/tiny-idefics3] [--out FOLDER]

Needs torch and transformers. `cases.json` has the chats, token ids, greedy tokens and answers,
`cases.npz` the pictures (uint8 [N, 64, 64, 3], of the size that the model takes, so that nothing is
resized) and, of the first LOGITS cases, the logits at all text positions, as float32 [T, V] rounded
as in tools/make_fixtures. The same versions write the same bytes again.
"""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.utils import logging

from .make_fixtures.reference_run import _rounded, relative_gap
from .train_tiny.evaluate_reference import encode_cases
from .train_tiny.families import make_family
from .train_tiny.family import Family
from .train_tiny.tasks import Case, messages_of, unseen_case

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "mlx_vlm_pipes" / "assets"
CASES, LOGITS, SIDE, SEED = 24, 8, 64, 7
MAX_TOKENS, MIN_TOKENS = 32, 5  # of an answer; at least, where its logits are kept
MIN_GAP = 2e-2  # of an answer's two best logits, of the largest: what bfloat16 does not exchange


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, default=ASSETS / "tiny-idefics3")
    parser.add_argument("--out", type=Path, default=ASSETS / "device_references")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    args.out.mkdir(exist_ok=True)
    write_references(args.model, args.out)


def write_references(model: Path, out: Path) -> None:
    """The first CASES unseen cases that the model answers well; see the module's docstring."""
    facts, pictures, arrays = [], [], {}
    for fact, picture, logits in answered(model):
        if len(facts) < LOGITS:
            arrays[f"logits_{len(facts)}"] = _rounded(logits)
        facts.append(fact)
        pictures.append(picture)
        if len(facts) == CASES:
            break
    arrays["pictures"] = np.stack(pictures)
    np.savez_compressed(out / "cases.npz", **arrays)
    weights = (model / "model.safetensors").read_bytes()
    about = {
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "cases": facts,
    }
    (out / "cases.json").write_text(json.dumps(about) + "\n", encoding="utf-8")


def answered(model: Path) -> Iterator[tuple[dict, np.ndarray, np.ndarray]]:
    """Facts, picture and text positions' logits of cases with clear and right answers.

    The first have answers of several tokens and prompts of many lengths: they make a batch too.
    """
    family = make_family("idefics3")
    network = transformers.Idefics3ForConditionalGeneration.from_pretrained(
        model, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    found, seen = [], Counter()
    for index in range(12 * CASES):
        case = unseen_case("idefics3", SEED, index)
        if case.images[0].size != (SIDE, SIDE):
            continue
        ids, tokens, gap, logits = run(network, family, model, case)
        text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        if text != case.turns[-1][1] or gap < MIN_GAP:
            continue
        keep = np.array(ids) != network.config.image_token_id
        fact = {"messages": messages_of(case), "ids": ids, "tokens": tokens, "answer": text}
        place = len(tokens) < MIN_TOKENS, seen[len(ids)]
        seen[len(ids)] += 1
        found.append((place, fact, np.asarray(case.images[0].convert("RGB")), logits[keep]))
    for _, fact, picture, kept in sorted(found, key=lambda one: one[0]):
        yield fact, picture, kept


def run(
    network: torch.nn.Module, family: Family, model: Path, case: Case
) -> tuple[list[int], list[int], float, np.ndarray]:
    """Token ids, greedy tokens, the smallest gap on the way, logits [T, V] of the prompt."""
    (((_, ids, media),),) = encode_cases(family, model, [case]).values()
    inputs = {"input_ids": torch.tensor([ids]), **family.stack([media])}
    with torch.no_grad():
        logits = network(**inputs, use_cache=False).logits[0].numpy()
        out = network.generate(
            **inputs, max_new_tokens=MAX_TOKENS, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    steps = torch.cat(out.logits).numpy()
    return ids, out.sequences[0, len(ids) :].tolist(), relative_gap(steps), logits


if __name__ == "__main__":
    main()
