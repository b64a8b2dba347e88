"""diffpo's own format: config.json holds the fields of ModelConfig, and tensors carry the names of the modules."""

import json

from pydantic import ValidationError

from diffpo.models.formats.config_keys import refuse_keys_that_act, with_rope_theta
from diffpo.models.formats.value_types import refuse_wrong_types
from diffpo.models.transformer import ModelConfig

_FIELDS = tuple(ModelConfig.__annotations__)


class DiffpoFormat:
    model_type = "diffpo"
    mask_token = None  # the tokenizer names it

    def config(self, fields: dict, where) -> ModelConfig:
        """The ModelConfig in the fields of a config.json; ValueError for one that is unknown or does not fit."""
        fields = with_rope_theta(fields, where)
        refuse_keys_that_act(fields, _FIELDS, self.model_type, where)
        refuse_wrong_types(fields, {name: name for name in _FIELDS}, where)
        fields = {key: value for key, value in fields.items() if key in _FIELDS}
        try:
            return ModelConfig(**fields)
        except ValidationError as error:
            raise ValueError(f"{where}: {error}") from error

    def fields(self, config: ModelConfig, original: dict | None = None) -> dict:
        return json.loads(config.model_dump_json())

    def tensor_name(self, name: str) -> str:
        return name


DIFFPO = DiffpoFormat()
