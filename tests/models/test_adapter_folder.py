"""Folders of adapters: written in the published names, read back merged, by peft too; what is more than plain LoRA is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import diffpo
from diffpo.models.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_in
from diffpo.models.adapter_saving import is_an_adapter, save_adapter
from diffpo.models.checkpoints import open_checkpoint, save_checkpoint
from diffpo.models.lora import add_lora, lora_layers, target_modules
from diffpo.models.threshold_file import THRESHOLD

peft = pytest.importorskip("peft", reason="needs the extra diffpo[lora]")
TOKENS = torch.arange(3, 12)[None]
families = pytest.mark.parametrize("family", ["llada", "Dream"])


@pytest.fixture
def adapted(published):
    """adapted(family, rank, alpha, targets, threshold, **of published) -> a model in a published format with LoRA that does something."""

    def build(family="llada", rank=2, alpha=6, targets=None, threshold=False, **changes):
        model = diffpo.load(published(family, **changes)[0])
        if threshold:
            model.add_threshold((0.5, 2.0))
        add_lora(model, target_modules(model, targets), rank, alpha, 0)
        generator = torch.Generator().manual_seed(1)
        for _, layer in lora_layers(model):
            layer.lora_B["default"].weight.data.normal_(std=0.2, generator=generator)
        if threshold:
            model.threshold.linear.weight.data.normal_(generator=generator)
        return model

    return build


def settings(folder) -> dict:
    return json.loads((folder / ADAPTER_CONFIG).read_text())


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_loads_as_the_merged_model(adapted, tmp_path, family, dtype):
    model = adapted(family, dtype=dtype)
    save_adapter(model, tmp_path / "adapter")
    save_checkpoint(model, tmp_path / "merged")
    loaded, merged = diffpo.load(tmp_path / "adapter"), diffpo.load(tmp_path / "merged")
    assert loaded.config == merged.config
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-9}
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, **close)
    assert loaded.dtype == dtype
    assert (loaded.logits(TOKENS) - diffpo.load(model.source.name).logits(TOKENS)).abs().max() > 0.1
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
    loaded.save(tmp_path / "again")
    assert diffpo.load(tmp_path / "again").config == merged.config


class Published(nn.Module):
    """A model whose layers stand at the published names, as the remote code has them."""

    def __init__(self, linear: dict[str, torch.Tensor]):
        super().__init__()
        for name, weight in linear.items():
            place = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            place.add_module(last, nn.Linear(weight.shape[1], weight.shape[0], bias=False))
            getattr(place, last).weight.data = weight.clone()


@families
def test_peft_reads_it_into_a_model_with_the_published_names(adapted, tmp_path, family):
    """And puts it on the layers of the blocks alone, although LLaDA's head ends as its down projection does."""
    model = adapted(family)
    save_adapter(model, tmp_path / "adapter")
    save_checkpoint(model, tmp_path / "merged")
    stored = load_file(f"{model.source.name}/model.safetensors")
    linear = {name.removesuffix(".weight"): t for name, t in stored.items() if t.dim() == 2}
    wrapped = peft.PeftModel.from_pretrained(Published(linear), tmp_path / "adapter")
    merged = wrapped.merge_and_unload().state_dict()
    expected = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(merged) <= set(expected)
    changed = {name for name in merged if not torch.equal(merged[name], stored[name])}
    assert len(changed) == 7 * model.config.num_hidden_layers
    assert not any("head" in name or name.endswith("transformer.ff_out.weight") for name in changed)
    for name in merged:
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-5, atol=1e-6)


def test_what_peft_saves_of_our_own_format_is_read(random_model, tmp_path):
    random_model(1).save(tmp_path / "base")
    wrapped = peft.get_peft_model(
        diffpo.load(tmp_path / "base"),
        peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["up_proj", "lm_head"]),
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    wrapped.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    wrapped.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").unlink(missing_ok=True)
    loaded = diffpo.load(tmp_path / "adapter")
    torch.testing.assert_close(loaded.logits(TOKENS), wrapped.merge_and_unload().logits(TOKENS), rtol=1e-5, atol=1e-5)


@families
def test_a_learned_threshold_lies_beside_it(adapted, tmp_path, family):
    model = adapted(family, threshold=True)
    save_adapter(model, tmp_path / "adapter")
    assert (tmp_path / "adapter" / THRESHOLD).exists()
    loaded = diffpo.load(tmp_path / "adapter")
    assert loaded.config == model.config
    assert torch.equal(loaded.threshold.linear.weight, model.threshold.linear.weight)
    out = diffpo.generate(loaded, [TOKENS[0]], gen_length=6, rule=diffpo.PromptThreshold())
    assert out.trajectory.gamma.isfinite().all()


def test_an_adapter_on_a_base_with_another_threshold(adapted, tmp_path):
    model = adapted(threshold=True)
    save_checkpoint(model, tmp_path / "base")
    second = diffpo.load(tmp_path / "base")
    second.add_threshold((1.0,), reads="completion")
    add_lora(second, target_modules(second, ["q_proj"]), 2, 2, 0)
    save_adapter(second, tmp_path / "adapter")
    loaded = diffpo.load(tmp_path / "adapter")
    assert loaded.config.threshold_gammas == (1.0,)
    assert open_checkpoint(tmp_path / "adapter").base.model.config.threshold_gammas == (0.5, 2.0)


def change(folder, **values) -> None:
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings(folder) | values))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'; only plain LoRA is read.*merge_and_unload"),
        ({"use_dora": True}, "use_dora True"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"r": 3}, "q_proj does not fit: rank 3"),
        ({"r": 0}, "has r 0"),
        ({"r": True}, "has r True"),
        ({"lora_alpha": "8"}, "lora_alpha '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha|NaN"),
        ({"base_model_name_or_path": None}, "names no base model.*base_model_name_or_path"),
        ({"base_model_name_or_path": 3}, "has base 3"),
    ],
    ids=str,
)
def test_what_is_more_than_plain_lora_is_refused_by_name(adapted, tmp_path, values, said):
    save_adapter(adapted(), tmp_path / "adapter")
    change(tmp_path / "adapter", **values)
    with pytest.raises(ValueError, match=said):
        diffpo.load(tmp_path / "adapter")


def test_a_base_that_is_not_there_or_is_an_adapter_or_another_model(adapted, published, tmp_path):
    save_adapter(adapted(), tmp_path / "adapter")
    shutil.copytree(tmp_path / "adapter", tmp_path / "second")
    change(tmp_path / "second", base_model_name_or_path=str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="is an adapter itself"):
        diffpo.load(tmp_path / "second")
    change(tmp_path / "second", base_model_name_or_path="nobody/nothing")
    with pytest.raises(FileNotFoundError, match=r"its base is not there.*nobody/nothing.*base_model_name_or_path"):
        diffpo.load(tmp_path / "second")
    other = published("Dream", "other")[0]
    change(tmp_path / "second", base_model_name_or_path=str(other))
    with pytest.raises(
        ValueError, match=r"of another model than .*other.*it holds base_model\.model\.model\.transformer"
    ):
        diffpo.load(tmp_path / "second")
    smaller = published("llada", "smaller", n_layers=1)[0]
    change(tmp_path / "second", base_model_name_or_path=str(smaller))
    with pytest.raises(ValueError, match=r"of another model.*blocks\.1\."):
        diffpo.load(tmp_path / "second")


def test_half_of_a_pair_is_refused(adapted, tmp_path):
    save_adapter(adapted(), tmp_path / "adapter")
    file = tmp_path / "adapter" / ADAPTER_WEIGHTS
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, file)
    with pytest.raises(ValueError, match="does not fit"):
        diffpo.load(tmp_path / "adapter")


def test_what_a_folder_cannot_hold_is_not_saved(adapted, random_model, tmp_path):
    model = adapted()
    next(lora_layers(model))[1].lora_A["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        save_adapter(model, tmp_path / "nan")
    for wrapped in (
        peft.get_peft_model(
            random_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
        ).get_base_model(),
        peft.get_peft_model(
            random_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        ).get_base_model(),
        peft.get_peft_model(
            random_model(), peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 3})
        ).get_base_model(),
        random_model(),
    ):
        assert not is_an_adapter(wrapped)
        with pytest.raises(ValueError, match="no adapter that a folder"):
            save_adapter(wrapped, tmp_path / "others")
    assert not list(tmp_path.glob("others/*"))


def test_adapters_beside_a_config_are_no_adapter_folder(adapted, tmp_path):
    model = adapted()
    save_checkpoint(model, tmp_path)
    save_adapter(model, tmp_path)
    assert adapter_in(tmp_path) is None
    with pytest.raises(ValueError, match="which would be ignored"):
        diffpo.load(tmp_path)


def test_weights_kept_in_fp32_are_saved_in_the_dtype_of_the_network(published, tmp_path):
    """A fully trained bf16 model: its fp32 weights are the optimizer's affair."""
    model = diffpo.load(published("llada", dtype=torch.bfloat16)[0])
    model.compute_dtype = torch.bfloat16
    model.float()
    model.add_threshold((0.5,))
    model.save(tmp_path / "trained")
    assert {t.dtype for t in load_file(tmp_path / "trained" / "model.safetensors").values()} == {torch.bfloat16}
    assert load_file(tmp_path / "trained" / THRESHOLD)["linear.weight"].dtype == torch.float32
    assert torch.equal(diffpo.load(tmp_path / "trained").logits(TOKENS), model.logits(TOKENS))
