"""LlavaForConditionalGeneration with a Pixtral tower: images in their own size, row by row."""

import numpy as np
import transformers
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from ..case import Json, Prompt
from ..tokenizer import write_json
from .family import Arrays, Pictures, VisionFamily, fill_placeholders


class Pixtral(VisionFamily):
    style = "pixtral"
    architecture = "LlavaForConditionalGeneration"
    processor_class = "PixtralProcessor"
    template_in = "chat_template.json"

    def config(self) -> transformers.PretrainedConfig:
        fields = self.case.config
        return transformers.LlavaConfig(
            vision_config=transformers.PixtralVisionConfig(**fields["vision"]),
            text_config=self.text_config("MistralConfig"),
            image_token_index=self.files["[IMG]"],
            vision_feature_layer=fields.get("vision_feature_layer", -1),
            vision_feature_select_strategy="full",
            projector_hidden_act="gelu",
            multimodal_projector_bias=fields.get("projector_bias", True),
            image_seq_length=1,
            tie_word_embeddings=self.is_tied,
        )

    @property
    def patch_px(self) -> int:
        return self.case.config["vision"]["patch_size"]

    def settings(self) -> Json:
        longest = self.options.longest_edge or self.case.config["vision"]["image_size"]
        return {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "patch_size": {"height": self.patch_px, "width": self.patch_px},
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"longest_edge": longest},
        }

    def write_processor(self) -> None:
        owner = {"processor_class": self.processor_class}
        image = {**self.settings(), "image_processor_type": "PixtralImageProcessor"}
        processor = {
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
            "image_token": "[IMG]",
            "patch_size": self.patch_px,
            **owner,
        }
        if self.options.nested_processor:
            processor.update(spatial_merge_size=1, image_processor=image)
        else:
            write_json(self.folder / "preprocessor_config.json", {**image, **owner})
        self.write_processor_config(processor)

    def expand(self, text: str, prompt: Prompt, pictures: Pictures) -> tuple[str, Arrays]:
        if not pictures.images:
            return text, {}
        out = PixtralImageProcessorPil(**self.settings())(pictures.images, return_tensors="np")
        sizes = np.asarray(out["image_sizes"], dtype=np.int64)
        blocks = []
        for rows, cols in (sizes // self.patch_px).tolist():
            if not rows:
                raise IndexError("as PixtralProcessor on a picture lower than a patch")
            blocks.append("[IMG_BREAK]".join(["[IMG]" * cols] * rows) + "[IMG_END]")
        pixels = np.asarray(out["pixel_values"], dtype=np.float32)
        filled = fill_placeholders(text, "[IMG]", blocks)
        return filled, {"pixel_values": pixels, "image_sizes": sizes}
