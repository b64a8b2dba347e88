"""diffpo's own format: config.json holds the fields of ModelConfig, and tensors carry the names of the modules."""

from pathlib import Path

from diffpo.models.formats.config_keys import refuse_keys_that_act, with_rope_theta
from diffpo.models.model_config import FIELDS, RENAMED, ModelConfig


class DiffpoFormat:
    model_type = "diffpo"
    mask_token = None  # the tokenizer names it

    def config(self, fields: dict, where: str | Path) -> ModelConfig:
        """The ModelConfig in the fields of a config.json; ValueError for one that is unknown or does not fit."""
        fields = with_rope_theta(fields, where)
        known = (*FIELDS, *RENAMED)
        refuse_keys_that_act(fields, known, self.model_type, where)
        fields = {key: value for key, value in fields.items() if key in known}
        try:
            return ModelConfig(**fields)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def fields(self, config: ModelConfig, original: dict | None = None) -> dict:
        """config.json. head_dim is left out where it follows from the others: older readers do not know it."""
        fields = config.model_dump()
        if config.head_dim * config.num_attention_heads == config.hidden_size:
            del fields["head_dim"]
        return fields

    def tensor_name(self, name: str) -> str:
        return name


DIFFPO = DiffpoFormat()
