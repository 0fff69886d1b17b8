"""Train one of the small models from scratch.

    python -m tools.train_tiny.train idefics3 --out FOLDER [--steps 3000] [--seed 0]

Writes a complete Hugging Face folder to --out every --save-every steps and at the end.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers.utils import logging

from .families import FAMILIES, make_family
from .family import IGNORED, Family
from .shapes import COLOURS, EVEN, RADII, SHAPES, UNLABELLED
from .start import start_from
from .tasks import MIXES

PEAK_RATE = 2e-3
WEIGHT_DECAY = 0.02


class Teacher(torch.nn.Module):
    """A linear map from image features to what stands in their cell, used in training only.

    Answers alone teach the vision tower slowly: one word in ten tells one shape from another.
    """

    def __init__(self, family: Family, model: torch.nn.Module) -> None:
        super().__init__()
        self.parts = (len(SHAPES) + 1, len(COLOURS), len(RADII))
        self.classify = torch.nn.Linear(model.config.text_config.hidden_size, sum(self.parts))
        torch.nn.init.zeros_(self.classify.weight)
        self.features: torch.Tensor | None = None
        family.projector(model).register_forward_hook(self._keep)

    def _keep(self, _: torch.nn.Module, __: tuple, output: object) -> None:
        rows = output if isinstance(output, torch.Tensor) else output.pooler_output
        self.features = rows.flatten(0, -2)

    def loss(self, cells: torch.Tensor) -> torch.Tensor:
        """Sum of the cross entropies of shape, colour and size; cells [M, 3]."""
        scores = self.classify(self.features).split(self.parts, dim=-1)
        return sum(
            functional.cross_entropy(score, cells[:, i], ignore_index=UNLABELLED)
            for i, score in enumerate(scores)
        )


def answer_loss(model: torch.nn.Module, inputs: dict, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over the answer tokens; logits are computed only there."""
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    asked = labels != IGNORED
    return functional.cross_entropy(model.lm_head(hidden[asked]), labels[asked])


def train(family: Family, model: torch.nn.Module, args: argparse.Namespace) -> float:
    """Run the optimiser and save. Returns the mean loss of the last hundred steps."""
    teacher = Teacher(family, model)
    if args.keep_layers:
        model.requires_grad_(requires_grad=False)
        for changed in (family.projector(model), model.get_input_embeddings(), model.lm_head):
            changed.requires_grad_(requires_grad=True)
    optimiser = torch.optim.AdamW(
        [p for p in (*model.parameters(), *teacher.parameters()) if p.requires_grad],
        args.rate,
        (0.9, 0.98),
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, args.rate, total_steps=args.steps, pct_start=args.warmup
    )
    model.train()
    rng = np.random.default_rng(args.seed)
    shares, mixes = zip(*MIXES[args.mix], strict=True)
    mixes = [replace(mix, tiled=args.tiled) for mix in mixes]
    losses, started = [], time.time()
    for step in range(1, args.steps + 1):
        mix = mixes[0] if len(mixes) == 1 else mixes[int(rng.choice(len(mixes), p=shares))]
        cases = family.sample_batch(rng, args.batch_size, mix)
        cases = [replace(case, media_last=rng.random() < args.media_last) for case in cases]
        inputs, labels, cells = family.batch(cases)
        loss = answer_loss(model, inputs, labels)
        taught = teacher.loss(cells)
        (loss + args.teacher * taught).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0 or step == 5:
            recent, seconds = float(np.mean(losses[-50:])), time.time() - started
            told = f"loss {recent:.4f}  cells {taught.item():.3f}  {seconds:.0f} s"
            print(f"step {step}  {told}", flush=True)
        if step % args.save_every == 0:
            family.save(model, args.out)
    family.save(model, args.out)
    return float(np.mean(losses[-100:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=PEAK_RATE, help="peak learning rate")
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mix", choices=MIXES, default="even", help="what to concentrate on")
    parser.add_argument("--tiled", type=float, default=EVEN.tiled, help="see Mix; InternVL only")
    parser.add_argument(
        "--media-last", type=float, default=0.0, help="share of chats with the question first"
    )
    parser.add_argument("--teacher", type=float, default=0.5, help="weight of the cells' loss")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=300)
    parser.add_argument("--start-from", type=Path, help="begin with this folder's weights")
    parser.add_argument(
        "--keep-layers", action="store_true", help="train projector, embeddings and head only"
    )
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    family = make_family(args.family)
    model = family.new_model(args.seed)
    size = sum(p.numel() for p in model.parameters())
    print(f"{args.family}: {size} parameters, vocabulary {family.vocab_size}", flush=True)
    if args.start_from:
        print(f"copied {start_from(model, family, args.start_from)} parameters", flush=True)
    started = time.time()
    loss = train(family, model, args)
    facts = {"final_loss": round(loss, 5), "minutes": round((time.time() - started) / 60, 1)}
    print(json.dumps({"family": args.family, "steps": args.steps, "seed": args.seed, **facts}))


if __name__ == "__main__":
    main()
