"""The shared text processor; its rules are tested in tests/processing/test_tokenizer.py."""

from mlx_vlm_pipes.architectures.llama3.processing import Llama3Processor
from mlx_vlm_pipes.contexts import SamplingParams, TextAndVisionContext, TextContext
from mlx_vlm_pipes.processing.types import PromptRequest
from tests.processing.folders import make_folder, template


def test_context(tmp_path) -> None:
    processor = Llama3Processor(make_folder(tmp_path, [], {}, template()), {})
    processed = processor.process(PromptRequest("hi"))
    sampling = SamplingParams(stop=("END",), stop_token_ids=(3,))
    context = processor.new_context(processed, max_length=99, sampling_params=sampling)
    assert type(context) is TextContext
    assert not isinstance(context, TextAndVisionContext)
    assert context.tokens.all.tolist() == processed.input_ids
    assert context.eos_tracker.eos_token_ids == {3, processor.tokenizer.eos_token_id}
    assert context.eos_tracker.eos_stop_strings == ("END",)
    assert processed.pixel_values is None
    assert processed.extra == {}
