"""Write the numbers that transformers gives for the real checkpoint, for tests marked `real`.

    python -m tools.real_reference [OUT]

Needs torch, transformers 5 and gguf, and the file of tools/real_checkpoint.py, which transformers
expands to float32. OUT (tests/fixtures/real) receives `prompts.json`: conversations, their token
ids and 64 greedy tokens each; and `logits.npz`, for each conversation with its answer, at all
positions: `<n>/best` token, `<n>/log_sum` of the exponentials, and `<n>/some` [T, COLUMNS], every
VOCABULARY/COLUMNS-th logit.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.real_checkpoint import checkpoint_path

COLUMNS = 64
MAX_TOKENS = 64
CONVERSATIONS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Write a haiku about the sea."}],
    [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
    ],
    [{"role": "user", "content": "Add 17 and 2025, then explain how you did it."}],
    [
        {"role": "user", "content": "Name a fruit."},
        {"role": "assistant", "content": "An apple."},
        {"role": "user", "content": "And a yellow one? Say it in français, s'il vous plaît."},
    ],
    [{"role": "user", "content": "Write a Python function that reverses a list in place."}],
]


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/fixtures/real")
    out.mkdir(parents=True, exist_ok=True)
    path = checkpoint_path()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    prompts, arrays = [], {}
    for number, messages in enumerate(CONVERSATIONS):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            every = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=MAX_TOKENS, min_new_tokens=MAX_TOKENS,
            )  # fmt: skip
            logits = model(every).logits[0]
        answer = every[0, ids.shape[1] :].tolist()
        prompts.append({"messages": messages, "ids": ids[0].tolist(), "greedy": answer})
        step = logits.shape[-1] // COLUMNS
        arrays[f"{number}/best"] = logits.argmax(-1).numpy().astype(np.int32)
        arrays[f"{number}/log_sum"] = torch.logsumexp(logits, -1).numpy()
        arrays[f"{number}/some"] = logits[:, ::step].numpy()
        print(number, tokenizer.decode(answer)[:70].replace("\n", " "))
    (out / "prompts.json").write_text(json.dumps(prompts, indent=1, ensure_ascii=False) + "\n")
    np.savez_compressed(out / "logits.npz", **arrays)


if __name__ == "__main__":
    main()
