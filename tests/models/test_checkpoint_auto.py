"""AutoConfig and AutoModel of transformers give diffpo's model, without remote code."""

import pytest
import torch

import diffpo

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    from diffpo.models.auto import register

    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked whether to trust remote code"))
    register()
    register()


@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_auto_classes_give_the_same_model_as_load(published, family):
    folder, fields, _ = published(family, shards=2)
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.model_type == family
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 2, 4)
    assert config.mask_token_id == fields["mask_token_id"]
    model = transformers.AutoModel.from_pretrained(folder)
    assert type(model) is diffpo.MaskedDiffusionLM
    loaded = diffpo.load(folder)
    assert model.config == loaded.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert model.tokenizer.mask_token_id == fields["mask_token_id"]
    half = transformers.AutoModel.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="cpu", trust_remote_code=False
    )
    assert half.embed_tokens.weight.dtype == torch.bfloat16


def test_own_checkpoints_load_too(random_model, tmp_path):
    model = random_model(threshold_gammas=(0.0, 0.5))
    model.save(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded.threshold.linear.weight, model.threshold.linear.weight)


@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_a_model_from_a_config_is_fresh(published, family):
    folder, _, tensors = published(family, tokenizer=False)
    model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(folder))
    assert model.config == diffpo.load(folder).config
    assert not any(torch.equal(model.embed_tokens.weight, tensor) for tensor in tensors.values())


def test_arguments_without_effect_are_refused(published):
    folder, _, _ = published("llada", tokenizer=False)
    for override in ({"rope_theta": 5.0}, {"max_memory": {0: "1GB"}}):
        with pytest.raises(TypeError, match=f"does not take {next(iter(override))}"):
            transformers.AutoModel.from_pretrained(folder, **override)
    with pytest.raises(ValueError, match="device_map"):
        transformers.AutoModel.from_pretrained(folder, device_map={"layers.0": "cpu", "": "cpu"})
