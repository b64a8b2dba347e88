"""diffpo's own format: config.json holds the fields of ModelConfig, and tensors carry the names of the modules."""

from diffpo.models.transformer import ModelConfig


class DiffpoFormat:
    model_type = "diffpo"
    mask_token = None  # the tokenizer names it

    def config(self, fields: dict, where) -> ModelConfig:
        """The ModelConfig in the fields of a config.json; ValueError for one that is unknown or does not fit."""
        try:
            return ModelConfig(**fields)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def fields(self, config: ModelConfig, original: dict | None = None) -> dict:
        return config.model_dump()

    def tensor_name(self, name: str) -> str:
        return name


DIFFPO = DiffpoFormat()
