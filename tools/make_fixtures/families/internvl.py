"""InternVLForConditionalGeneration: images cut into square tiles, a thumbnail last."""

import numpy as np
import transformers
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from ..case import Json, Prompt
from ..tokenizer import write_json
from .family import Arrays, Pictures, VisionFamily, fill_placeholders


class InternVL(VisionFamily):
    style = "internvl"
    architecture = "InternVLForConditionalGeneration"
    processor_class: str | None = "InternVLProcessor"
    template_in = "chat_template.jinja"
    placeholder = "<IMG_CONTEXT>"

    def config(self) -> transformers.PretrainedConfig:
        fields = self.case.config
        return transformers.InternVLConfig(
            vision_config=transformers.InternVLVisionConfig(**fields["vision"]),
            text_config=self.text_config(fields["llm"]),
            image_token_id=self.files["<IMG_CONTEXT>"],
            image_seq_length=self.num_tile_tokens,
            downsample_ratio=0.5,
            projector_hidden_act="gelu",
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=self.is_tied,
        )

    @property
    def tile_px(self) -> int:
        return self.case.config["vision"]["image_size"][0]

    @property
    def num_tile_tokens(self) -> int:
        return (self.tile_px // self.case.config["vision"]["patch_size"][0] // 2) ** 2

    def settings(self) -> Json:
        return {
            "crop_to_patches": False,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "max_patches": self.options.max_patches,
            "min_patches": 1,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"height": self.tile_px, "width": self.tile_px},
        }

    def write_processor(self) -> None:
        owner = {"processor_class": self.processor_class}
        image = {**self.settings(), "image_processor_type": "GotOcr2ImageProcessorFast"}
        video = {k: v for k, v in self.settings().items() if "patches" not in k}
        video["video_processor_type"] = "InternVLVideoProcessor"
        processor = {"image_seq_length": self.num_tile_tokens, **owner}
        if self.options.nested_processor:
            processor.update(image_processor=image, video_processor=video)
        else:
            write_json(self.folder / "preprocessor_config.json", {**image, **owner})
            write_json(self.folder / "video_preprocessor_config.json", {**video, **owner})
        self.write_processor_config(processor)

    def expand(self, text: str, prompt: Prompt, pictures: Pictures) -> tuple[str, Arrays]:
        if not pictures.images:
            return text, {}
        processor = GotOcr2ImageProcessorPil(**self.settings())
        out = processor(pictures.images, return_tensors="np", crop_to_patches=True)
        counts = [int(tiles) * self.num_tile_tokens for tiles in out["num_patches"]]
        blocks = ["<img>" + "<IMG_CONTEXT>" * n + "</img>" for n in counts]
        pixels = np.asarray(out["pixel_values"], dtype=np.float32)
        return fill_placeholders(text, self.placeholder, blocks), {"pixel_values": pixels}
