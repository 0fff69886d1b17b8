"""Idefics3 and SmolVLM: images cut into rows and columns of tiles, then the whole image."""

import numpy as np
import transformers
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from ..case import Json, Prompt
from ..tokenizer import write_json
from .family import Arrays, Pictures, VisionFamily, fill_placeholders


class Idefics3(VisionFamily):
    style = "idefics3"
    architecture = "Idefics3ForConditionalGeneration"
    processor_class = "Idefics3Processor"
    template_in = "chat_template.json"
    image_processor = Idefics3ImageProcessorPil

    def config(self) -> transformers.PretrainedConfig:
        fields = self.case.config
        cls_name = self.architecture.replace("ForConditionalGeneration", "Config")
        return getattr(transformers, cls_name)(
            text_config=self.text_config("LlamaConfig"),
            vision_config=dict(fields["vision"]),
            scale_factor=fields["scale_factor"],
            image_token_id=self.files["<image>"],
            tie_word_embeddings=self.is_tied,
            pad_token_id=self.files[self.files.style.pad],
        )

    @property
    def tile_px(self) -> int:
        return self.case.config["vision"]["image_size"]

    @property
    def num_tile_tokens(self) -> int:
        side = self.tile_px // self.case.config["vision"]["patch_size"]
        return side**2 // self.case.config["scale_factor"] ** 2

    def settings(self) -> Json:
        return {
            "do_convert_rgb": True,
            "do_image_splitting": self.options.split,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "max_image_size": {"longest_edge": self.tile_px},
            "resample": 1,
            "rescale_factor": 1 / 255,
            "size": {"longest_edge": self.options.longest_edge or 4 * self.tile_px},
        }

    def file_settings(self) -> Json:
        kind = self.processor_class.replace("Processor", "ImageProcessor")
        return {**self.settings(), "image_processor_type": kind}

    def write_processor(self) -> None:
        owner = {"processor_class": self.processor_class}
        processor = {"image_seq_len": self.num_tile_tokens, **owner}
        if self.options.nested_processor:
            processor["image_processor"] = self.file_settings()
        else:
            image = {**self.file_settings(), **owner}
            write_json(self.folder / "preprocessor_config.json", image)
        self.write_processor_config(processor)

    def expand(self, text: str, prompt: Prompt, pictures: Pictures) -> tuple[str, Arrays]:
        if not pictures.images:
            return text, {}
        processor = self.image_processor(**self.settings())
        out = processor([pictures.images], return_tensors="np", return_row_col_info=True)
        blocks = [self._block(*grid) for grid in zip(out["rows"][0], out["cols"][0], strict=True)]
        return fill_placeholders(text, "<image>", blocks), {
            "pixel_values": out["pixel_values"].astype(np.float32),
            "pixel_attention_mask": out["pixel_attention_mask"],
        }

    def _block(self, rows: int, cols: int) -> str:
        fake, run = "<fake_token_around_image>", "<image>" * self.num_tile_tokens
        block = ""
        for r in range(1, rows + 1):
            block += "".join(f"{fake}<row_{r}_col_{c}>{run}" for c in range(1, cols + 1)) + "\n"
        return block + ("\n" if rows else "") + f"{fake}<global-img>{run}{fake}"


class SmolVLM(Idefics3):
    style = "smolvlm"
    architecture = "SmolVLMForConditionalGeneration"
    processor_class = "SmolVLMProcessor"
    image_processor = SmolVLMImageProcessorPil

    def write_processor(self) -> None:
        owner = {"processor_class": self.processor_class}
        image, longest = self.file_settings(), {"longest_edge": self.tile_px}
        processor = {"image_seq_len": self.num_tile_tokens, **owner}
        if self.options.nested_processor:
            video = {k: v for k, v in self.settings().items() if k != "do_image_splitting"}
            video.update(video_processor_type="SmolVLMVideoProcessor", size=longest)
            video.update(fps=1, num_frames=64)
            processor.update(image_processor=image, video_processor=video)
        else:
            image["video_sampling"] = {"fps": 1, "max_frames": 64, "video_size": longest}
            write_json(self.folder / "preprocessor_config.json", {**image, **owner})
        self.write_processor_config(processor)
