"""What the tokenizers of the real families look like: splitting, special tokens, chat templates."""

from dataclasses import dataclass, field, replace

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ROW_COL = tuple(f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5))
_QWEN_BASE = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_INTERNVL = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>",
             "</box>")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Style:
    """`front` tokens get the lowest ids, `back` tokens follow the trained vocabulary."""

    template: str
    eos: str
    pad: str
    stop: tuple[str, ...]
    bos: str | None = None
    unk: str | None = None
    front: tuple[str, ...] = ()
    back: tuple[str, ...] = ()
    split: str | None = None  # None: GPT-2's own pattern, digits one by one
    is_metaspace: bool = False  # SentencePiece-like, with byte fallback
    is_nfc: bool = False
    adds_bos: bool = False
    ignores_merges: bool = False
    tokenizer_class: str = "PreTrainedTokenizerFast"
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def special(self) -> tuple[str, ...]:
        return self.front + self.back


_LLAMA3_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] | trim }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'text' %}{{- part['text'] | trim }}{%- endif %}"
    "{%- endfor %}{%- endif %}{{- '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
_LLAMA2_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_IDEFICS_TEMPLATE = (
    "{{ 'START' }}{% for message in messages %}"
    "{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}"
    "{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "{{ '<end_of_utterance>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_PIXTRAL_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set head = messages[0]['content'] %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set head = none %}{%- set turns = messages %}{%- endif %}"
    "{{- bos_token }}{%- for message in turns %}"
    "{%- if message['role'] == 'user' %}{{- '[INST]' }}"
    "{%- if loop.last and head is not none %}"
    "{%- if head is string %}{{- head }}{%- else %}{{- head[0]['text'] }}{%- endif %}"
    "{{- '\n\n' }}{%- endif %}"
    "{%- if message['content'] is string %}{{- message['content'] }}{%- else %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'text' %}{{- part['text'] }}"
    "{%- elif part['type'] == 'image' %}{{- '[IMG]' }}{%- endif %}{%- endfor %}"
    "{%- endif %}{{- '[/INST]' }}{%- else %}"
    "{%- if message['content'] is string %}{{- message['content'] }}{%- else %}"
    "{{- message['content'][0]['text'] }}{%- endif %}{{- eos_token }}"
    "{%- endif %}{%- endfor %}"
)
_INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' or 'video' in part %}"
    "{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN3_VL_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string %}{{- message.content }}"
    "{%- else %}{%- for content in message.content %}"
    "{%- if content.type == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif content.type == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{%- elif 'text' in content %}{{- content.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

# fmt: off
STYLES = {
    "llama3": Style(
        template=_LLAMA3_TEMPLATE,
        split=_LLAMA3,
        back=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
              "<|eot_id|>", "<|finetune_right_pad_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad="<|finetune_right_pad_id|>",
        stop=("<|end_of_text|>", "<|eot_id|>"),
        adds_bos=True,
        ignores_merges=True,
    ),
    "llama2": Style(
        template=_LLAMA2_TEMPLATE,
        is_metaspace=True,
        front=("<unk>", "<s>", "</s>"),
        back=("<pad>",),
        bos="<s>",
        eos="</s>",
        pad="<pad>",
        unk="<unk>",
        stop=("</s>",),
        adds_bos=True,
        tokenizer_class="LlamaTokenizer",
    ),
    "idefics3": Style(
        template=_IDEFICS_TEMPLATE.replace("START", "<|begin_of_text|>"),
        split=_LLAMA3,
        back=("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", *_ROW_COL, "<global-img>",
              "<fake_token_around_image>", "<image>", "<end_of_utterance>"),
        bos="<|begin_of_text|>",
        eos="<end_of_utterance>",
        pad="<|end_of_text|>",
        stop=("<|end_of_text|>", "<end_of_utterance>"),
        adds_bos=True,
        ignores_merges=True,
    ),
    "smolvlm": Style(
        template=_IDEFICS_TEMPLATE.replace("START", "<|im_start|>"),
        front=_QWEN_BASE,
        back=("<global-img>", *_ROW_COL, "<fake_token_around_image>", "<image>",
              "<end_of_utterance>"),
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        pad="<|im_end|>",
        unk="<|endoftext|>",
        stop=("<end_of_utterance>",),
        tokenizer_class="GPT2Tokenizer",
    ),
    "pixtral": Style(
        template=_PIXTRAL_TEMPLATE,
        split=_TEKKEN,
        front=("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]",
               "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]",
               "<pad>", "[IMG_BREAK]", "[IMG_END]"),
        bos="<s>",
        eos="</s>",
        pad="<pad>",
        unk="<unk>",
        stop=("</s>",),
        adds_bos=True,
        ignores_merges=True,
    ),
    "internvl": Style(
        template=_INTERNVL_TEMPLATE,
        split=_QWEN,
        is_nfc=True,
        back=(*_QWEN_BASE, *_INTERNVL, "<video>"),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        stop=("<|im_end|>", "<|endoftext|>"),
        tokenizer_class="Qwen2Tokenizer",
        extra={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "internvl_chat": Style(
        template=_CHATML_TEMPLATE,
        split=_QWEN,
        is_nfc=True,
        back=(*_QWEN_BASE, *_INTERNVL),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        stop=("<|im_end|>", "<|endoftext|>"),
        tokenizer_class="Qwen2Tokenizer",
    ),
    "qwen": Style(
        template=_QWEN_TEMPLATE,
        split=_QWEN,
        is_nfc=True,
        back=(*_QWEN_BASE, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
              "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
              "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        stop=("<|im_end|>", "<|endoftext|>"),
        tokenizer_class="Qwen2Tokenizer",
    ),
}
# fmt: on
STYLES["qwen3_vl"] = replace(STYLES["qwen"], template=_QWEN3_VL_TEMPLATE)
