"""Text-only decoders of the Llama family."""

import transformers

from .family import Family

CLASSES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig"),
    "mistral": ("MistralForCausalLM", "MistralConfig"),
    "granite": ("GraniteForCausalLM", "GraniteConfig"),
    "phi3": ("Phi3ForCausalLM", "Phi3Config"),
    "olmo": ("OlmoForCausalLM", "OlmoConfig"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config"),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config"),
}


class Text(Family):
    @property
    def architecture(self) -> str:
        return CLASSES[self.case.family][0]

    def adds_bos(self, text: str, *, is_raw: bool) -> bool:
        # Text models leave it to the chat template entirely.
        return is_raw and super().adds_bos(text, is_raw=is_raw)

    def config(self) -> transformers.PretrainedConfig:
        cls = getattr(transformers, CLASSES[self.case.family][1])
        return cls(vocab_size=self.vocab_size, **self.token_ids(), **self.case.config)
