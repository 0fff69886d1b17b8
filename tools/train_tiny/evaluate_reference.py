"""The same measurement through transformers: AutoTokenizer, PIL image processors, generate().

    python -m tools.train_tiny.evaluate_reference --model FOLDER [--cases 500] [--seed 1]
        [--media-last]

Also checks, for every case, that the pixel path of training equals transformers' processors.
"""

import argparse
import json
from collections import defaultdict
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.utils import logging

from .families import FAMILIES, make_family
from .family import Family
from .scoring import Score
from .tasks import Case, messages_of, unseen_case

MAX_TOKENS = 32
PIXEL_TOLERANCE = 1e-5
FAMILY_OF = {
    "idefics3": "idefics3",
    "qwen2_5_vl": "qwen2_5vl",
    "internvl": "internvl",
    "llava": "pixtral",
}
PROCESSORS = {
    "idefics3": ("idefics3", "Idefics3ImageProcessorPil"),
    "qwen2_5vl": ("qwen2_vl", "Qwen2VLImageProcessorPil"),
    "internvl": ("got_ocr2", "GotOcr2ImageProcessorPil"),
    "pixtral": ("pixtral", "PixtralImageProcessorPil"),
}
assert set(PROCESSORS) == set(FAMILIES)


def image_processor(family: Family, model: Path):
    """transformers' PIL processor with the folder's settings."""
    package, name = PROCESSORS[family.name]
    path = f"transformers.models.{package}.image_processing_pil_{package}"
    settings = json.loads((model / "preprocessor_config.json").read_text())
    for key in ("image_processor_type", "processor_class"):
        settings.pop(key)
    return getattr(import_module(path), name)(**settings)


def processed(processor, family: Family, case: Case) -> dict[str, np.ndarray]:
    """Model inputs for the media of a case; clips, which need torchvision there, as trained."""
    if case.clip:
        return family.media(case)
    images = [case.images] if family.name == "idefics3" else case.images
    out = processor(images, return_tensors="np")
    ours = family.media(case)
    for name, value in ours.items():
        if not np.allclose(value, out[name], atol=PIXEL_TOLERANCE):
            raise SystemExit(f"{name} differs from {type(processor).__name__}'s")
    return {name: np.asarray(out[name]) for name in ours}


def encode_cases(family: Family, model: Path, cases: list[Case]) -> dict[tuple, list]:
    """Cases as (index, ids, media), grouped so that a group makes one batch without padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    processor = image_processor(family, model)
    groups = defaultdict(list)
    for index, case in enumerate(cases):
        text = tokenizer.apply_chat_template(
            messages_of(case), tokenize=False, add_generation_prompt=True
        )
        media = processed(processor, family, case)
        ids = tokenizer(family.expand(text, media), add_special_tokens=False)["input_ids"]
        shapes = tuple((name, value.shape) for name, value in sorted(media.items()))
        groups[(len(ids), shapes)].append((index, ids, media))
    return groups


def evaluate(model: Path, cases: int, seed: int, *, media_last: bool = False) -> dict:
    """The report of a Score over that many unseen cases, weights widened to float32."""
    model_type = json.loads((model / "config.json").read_text())["model_type"]
    family = make_family(FAMILY_OF[model_type])
    drawn = [unseen_case(model_type, seed, i, media_last=media_last) for i in range(cases)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = getattr(transformers, family.architecture).from_pretrained(model, dtype=torch.float32)
    score = Score()
    for group in encode_cases(family, model, drawn).values():
        ids = torch.tensor([ids for _, ids, _ in group])
        media = family.stack([media for _, _, media in group])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **media}
        with torch.no_grad():
            out = network.generate(
                **inputs, **family.extra_inputs(ids), max_new_tokens=MAX_TOKENS, do_sample=False
            )
        for (index, prompt, _), row in zip(group, out, strict=True):
            answer = tokenizer.decode(row[len(prompt) :], skip_special_tokens=True)
            stopped = bool(torch.isin(row[len(prompt) :], torch.tensor(_stops(network))).any())
            score.add(index, drawn[index], answer if stopped else answer + " (did not stop)")
    return score.report()


def _stops(network: torch.nn.Module) -> list[int]:
    return network.generation_config.eos_token_id


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--media-last", action="store_true", help="the question before the picture")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    settings = {"cases": args.cases, "seed": args.seed, "media_last": args.media_last}
    report = evaluate(args.model, **settings)
    print(json.dumps({"model": str(args.model), **settings, **report}, indent=2))


if __name__ == "__main__":
    main()
