"""What every architecture needs for training: files, token ids, labels, batches."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from .shapes import Mix, Scene, cell_labels
from .tasks import Case, corpus, messages_of
from .tokenizer import ChatFormat, train_tokenizer, write_json, write_tokenizer

IGNORED = -100  # label of a token that is not part of an answer
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# The same in all families, so that one's decoder can begin another's training (start.py).
DECODER = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}

View = tuple[Scene | None, int, int]


@dataclass(frozen=True)
class Encoded:
    """A rendered conversation: token ids, and labels that are IGNORED outside the answers."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


def normalised(picture: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """[H, W, 3] float32, scaled to 0..1 and normalised per channel."""
    pixels = np.asarray(picture, dtype=np.float32) / 255
    return (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


class Family:
    """One architecture: its files, placeholders and pixel path. Subclasses fill the gaps."""

    name: str
    architecture: str
    processor_class: str
    chat: ChatFormat

    def __init__(self) -> None:
        self.tokenizer = train_tokenizer(corpus(), self.chat)
        self.vocab_size = self.tokenizer.get_vocab_size()
        self.encode_text = lru_cache(maxsize=200_000)(self._encode_text)

    def sample_batch(self, rng: np.random.Generator, size: int, mix: Mix) -> list[Case]:
        """About size training cases whose media have equal sizes in the model."""
        raise NotImplementedError

    def model_config(self) -> transformers.PreTrainedConfig:
        raise NotImplementedError

    def write_processor(self, folder: Path) -> None:
        """preprocessor_config.json and processor_config.json."""
        raise NotImplementedError

    def media(self, case: Case) -> dict[str, np.ndarray]:
        """Model inputs for the pictures or the clip of one case, by the name the model takes."""
        raise NotImplementedError

    def expand(self, text: str, media: dict[str, np.ndarray]) -> str:
        """The rendered chat with every placeholder repeated as often as its features."""
        raise NotImplementedError

    def stack(self, media: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        """The media of several cases as one batch; by default everything is concatenated."""
        names = sorted({name for one in media for name in one})
        arrays = {n: np.concatenate([one[n] for one in media if n in one]) for n in names}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def projector(self, model: torch.nn.Module) -> torch.nn.Module:
        """The module whose output are the image features, in the order of views()."""
        raise NotImplementedError

    def views(self, case: Case, media: dict[str, np.ndarray]) -> list[View]:
        """What the feature rows of a case stand for: scene (None: part of one), rows, columns."""
        raise NotImplementedError

    def extra_inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Inputs that follow from the token ids."""
        return {}

    def token_id(self, token: str) -> int:
        return self.tokenizer.token_to_id(token)

    def special_ids(self) -> dict[str, int | None]:
        """bos, eos and pad ids as text configs take them."""
        return {
            "bos_token_id": self.token_id(self.chat.bos) if self.chat.bos else None,
            "eos_token_id": self.token_id(self.chat.answer_close),
            "pad_token_id": self.token_id(self.chat.pad),
        }

    def new_model(self, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        config = self.model_config()
        config._attn_implementation = "sdpa"
        return getattr(transformers, self.architecture)._from_config(config).float()

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """The whole checkpoint folder; weights in float16."""
        folder.mkdir(parents=True, exist_ok=True)
        half = type(model)(model.config)
        half.load_state_dict(model.state_dict())
        half.to(torch.float16).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config["dtype"] = "float16"
        write_json(folder / "config.json", config)
        ids = {key: value for key, value in self.special_ids().items() if value is not None}
        stops = {"eos_token_id": [self.token_id(token) for token in self.chat.stop]}
        version = {"transformers_version": transformers.__version__}
        write_json(folder / "generation_config.json", {**ids, **stops, **version})
        write_tokenizer(self.tokenizer, self.chat, folder, self.processor_class)
        self.write_processor(folder)

    def render(self, case: Case, *, with_last_answer: bool) -> str:
        """The chat as text, one placeholder per picture."""
        messages = messages_of(case)
        if with_last_answer:
            answer = {"type": "text", "text": case.turns[-1][1]}
            messages.append({"role": "assistant", "content": [answer]})
        return _compiled(self.chat.template).render(
            messages=messages,
            add_generation_prompt=not with_last_answer,
            bos_token=self.chat.bos,
            eos_token=self.chat.answer_close,
        )

    def _encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode(self, text: str) -> Encoded:
        """Ids and labels of a rendered chat whose answers are all there.

        Each answer is tokenised apart from what precedes it, as it is when generated.
        """
        ids, labels = [], []
        head, *rest = text.split(self.chat.answer_open)
        pieces = [(head + self.chat.answer_open if rest else head, False)]
        for i, part in enumerate(rest):
            answer, close, tail = part.partition(self.chat.answer_close)
            pieces.append((answer + close, True))
            pieces.append((tail + self.chat.answer_open if i + 1 < len(rest) else tail, False))
        for piece, is_answer in pieces:
            tokens = self.encode_text(piece)
            ids += tokens
            labels += tokens if is_answer else [IGNORED] * len(tokens)
        return Encoded(tuple(ids), tuple(labels))

    def batch(
        self, cases: list[Case]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Right-padded model inputs, labels [B, T] of the next tokens, cells [M, 3]."""
        media = [self.media(case) for case in cases]
        encoded = [
            self.encode(self.expand(self.render(case, with_last_answer=True), one))
            for case, one in zip(cases, media, strict=True)
        ]
        length = max(len(one.ids) for one in encoded)
        ids = np.full((len(cases), length), self.token_id(self.chat.pad), dtype=np.int64)
        labels = np.full((len(cases), length), IGNORED, dtype=np.int64)
        for row, one in enumerate(encoded):
            ids[row, : len(one.ids)] = one.ids
            labels[row, : len(one.ids) - 1] = one.labels[1:]
        tokens = torch.from_numpy(ids)
        inputs = {"input_ids": tokens, **self.stack(media), **self.extra_inputs(tokens)}
        views = [v for case, one in zip(cases, media, strict=True) for v in self.views(case, one)]
        cells = np.concatenate([cell_labels(*view) for view in views])
        return inputs, torch.from_numpy(labels), torch.from_numpy(cells)


@lru_cache
def _compiled(template: str):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
