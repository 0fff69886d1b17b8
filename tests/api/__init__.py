"""The documented API, used as somebody would who holds docs/api.md and nothing else."""

import pytest

pytest.register_assert_rewrite(
    "tests.api.contract", "tests.api.lora_contract", "tests.api.vision_contract"
)
