"""The LoRA model of a room, made once for each class of tests."""

import pytest

from tests.api.lora_contract import Adapted, adapted_model


@pytest.fixture(scope="class")
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return adapted_model(request.cls.room, tmp_path_factory.mktemp("lora"))
