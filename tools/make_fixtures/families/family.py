"""What every family shares: the model, the folder's files, and prompts turned into inputs."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from ..case import Case, Json, Prompt
from ..hub_config import hub_config
from ..tokenizer import TokenizerFiles, write_json
from ..weights import randomise, round_to

Arrays = dict[str, np.ndarray]
NUM_PADDED = 6  # rows of the embedding that no token uses, as real checkpoints have them


@dataclass(frozen=True)
class Pictures:
    images: list[Image.Image]
    videos: list[list[Image.Image]]


@dataclass(frozen=True)
class Encoded:
    """A prompt as the model takes it; `opaque` are the arrays with transparency dropped."""

    text: str
    ids: list[int]
    arrays: Arrays
    opaque: Arrays | None


class Family:
    """One architecture. Subclasses name its classes, fill `config`, `write_processor`, `expand`."""

    style = "llama3"
    architecture: str
    processor_class: str | None = None
    template_in = "tokenizer_config"

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.options, self.folder = case, case.options, folder
        self.files = TokenizerFiles(self.options.style or self.style)
        self.template_in = self.options.template_in or self.template_in
        self.vocab_size = self.files.size + NUM_PADDED
        self.extra_stop: list[int] = []

    def config(self) -> transformers.PretrainedConfig:
        raise NotImplementedError

    def write_processor(self) -> None:
        """Write the processor's files, if there are any."""

    def expand(self, text: str, prompt: Prompt, pictures: Pictures) -> tuple[str, Arrays]:
        """The text with its placeholders repeated, and the pixels."""
        return text, {}

    def template_messages(self, messages: list[Json]) -> list[Json]:
        return messages

    def adds_bos(self, text: str, *, is_raw: bool) -> bool:
        """Whether the tokenizer adds its BOS: not where the text has one already."""
        bos = self.files.style.bos
        return not (bos and text.startswith(bos))

    # The folder

    def token_ids(self) -> Json:
        style, ids = self.files.style, self.files.ids
        eos = self.files.stop_ids if self.options.eos_list else ids[style.eos]
        bos = None if style.bos is None else ids[style.bos]
        return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": ids[style.pad]}

    def new_model(self, seed: int) -> transformers.PreTrainedModel:
        config = self.config()
        config._attn_implementation = "eager"
        torch.manual_seed(0)
        model = getattr(transformers, self.architecture)._from_config(config).float().eval()
        quiet = {*self.files.ids.values(), *range(self.files.size, self.vocab_size)}
        randomise(model, seed, quiet, tied=bool(config.tie_word_embeddings))
        if self.options.dtype != "float32":
            round_to(model, getattr(torch, self.options.dtype))
        return model

    def save_tokenizer(self) -> None:
        self.files.save(
            self.folder, self.processor_class, self.template_in, self.options.tokenizer_form
        )
        self.write_processor()

    def save_weights(self, model: transformers.PreTrainedModel) -> None:
        if self.options.dtype != "float32":
            model = copy.deepcopy(model).to(getattr(torch, self.options.dtype))
        names, shards = self.options.original_names, self.options.shards
        total_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        for share in np.arange(1.0, 2.0, 0.02):
            for old in self.folder.glob("model*.safetensors*"):
                old.unlink()
            limit = int(total_bytes / shards * share) if shards > 1 else "5GB"
            model.save_pretrained(self.folder, save_original_format=names, max_shard_size=limit)
            if len(list(self.folder.glob("model*.safetensors"))) == shards:
                break
        else:
            raise RuntimeError(f"cannot cut the weights into {shards} shards")
        for path in self.folder.glob("*.safetensors"):
            path.chmod(0o644)

    def save_config(self) -> None:
        path = self.folder / "config.json"
        config = json.loads(path.read_text())
        if self.options.config_style == "hub":
            config = hub_config(config, self.case.family, self.options.sparse)
        write_json(path, config)
        generation_path = self.folder / "generation_config.json"
        generation_path.unlink(missing_ok=True)
        if self.options.generation is None:
            return
        ids, stop = self.token_ids(), [*self.files.stop_ids, *self.extra_stop]
        generation = {
            "_from_model_config": True,
            "eos_token_id": stop if len(stop) > 1 else stop[0],
            "pad_token_id": ids["pad_token_id"],
            "transformers_version": config["transformers_version"],
            **self.options.generation,
        }
        if ids["bos_token_id"] is not None:
            generation["bos_token_id"] = ids["bos_token_id"]
        write_json(generation_path, generation)

    def reload(self) -> transformers.PreTrainedModel:
        """The model from the folder alone."""
        cls = getattr(transformers, self.architecture)
        kwargs = {"dtype": torch.float32, "attn_implementation": "eager"}
        return cls.from_pretrained(self.folder, **kwargs).eval()

    # Prompts

    def load_tokenizer(self) -> None:
        self.hf_tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)
        # Some places of the template are read by processors only.
        self.hf_tokenizer.chat_template = self.files.style.template

    def render(self, prompt: Prompt) -> str:
        if prompt.messages is None:
            return prompt.text or ""
        return self.hf_tokenizer.apply_chat_template(
            self.template_messages(prompt.messages), tokenize=False, add_generation_prompt=True
        )

    def tokenize(self, text: str, *, is_raw: bool) -> list[int]:
        bos = self.adds_bos(text, is_raw=is_raw)
        ids = list(self.hf_tokenizer(text, add_special_tokens=bos)["input_ids"])
        if ids != list(self.files.tokenizer.encode(text, add_special_tokens=bos).ids):
            raise RuntimeError(f"AutoTokenizer and tokenizer.json disagree on {text[:80]!r}")
        return ids

    def encode(self, prompt: Prompt, names: Json) -> Encoded:
        images = [_open(self.folder / n) for n in names["images"]]
        videos = [[_open(self.folder / n) for n in clip] for clip in names["videos"]]
        text = self.render(prompt)
        expanded, arrays = self.expand(text, prompt, Pictures(images, videos))
        opaque = None
        if any("A" in p.getbands() for p in images):
            flat = Pictures([p.convert("RGB") for p in images], videos)
            opaque = self.expand(text, prompt, flat)[1]
        ids = self.tokenize(expanded, is_raw=prompt.text is not None)
        return Encoded(text, ids, arrays, opaque)

    def inputs(self, ids: list[int], arrays: Arrays) -> dict[str, torch.Tensor]:
        """What the transformers model takes."""
        mask = torch.ones(1, len(ids), dtype=torch.long)
        media = {key: torch.from_numpy(value) for key, value in arrays.items()}
        return {"input_ids": torch.tensor([ids]), "attention_mask": mask, **media}


class VisionFamily(Family):
    """A text decoder with an image tower: `case.config` has the parts "vision" and "text"."""

    def text_config(self, cls_name: str) -> transformers.PretrainedConfig:
        fields = {**self.token_ids(), **self.case.config["text"]}
        return getattr(transformers, cls_name)(vocab_size=self.vocab_size, **fields)

    @property
    def is_tied(self) -> bool:
        return self.case.config["text"].get("tie_word_embeddings", False)

    def write_processor_config(self, settings: Json) -> None:
        if "processor_config.json" in self.template_in.split("+"):
            settings = {**settings, "chat_template": self.files.style.template}
        write_json(self.folder / "processor_config.json", settings)


def fill_placeholders(text: str, placeholder: str, replacements: list[str]) -> str:
    """Put one replacement in the place of each placeholder, in order."""
    first, *rest = text.split(placeholder)
    if len(rest) != len(replacements):
        raise ValueError(f"{len(rest)} placeholders for {len(replacements)} images")
    return first + "".join(r + piece for r, piece in zip(replacements, rest, strict=True))


def _open(path: Path) -> Image.Image:
    picture = Image.open(path)
    picture.load()
    return picture
