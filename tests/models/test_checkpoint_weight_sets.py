"""What a folder may hold beside the tensors of the model: derived buffers, a tied head, stale files, adapters, renamed tensors."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffpo

INDEX = "model.safetensors.index.json"
NAMES = {
    "llada": ("model.transformer.wte.weight", "model.transformer.ff_out.weight", "weight_tying"),
    "Dream": ("model.embed_tokens.weight", "lm_head.weight", "tie_word_embeddings"),
}
both = pytest.mark.parametrize("family", ["llada", "Dream"])


def edit(folder, change, file="model.safetensors"):
    tensors = load_file(folder / file)
    changed = change(tensors)
    save_file(tensors if changed is None else changed, folder / file)


def same(model, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    "model.layers.1.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 64, 8),
    "model.layers.1.self_attn.rotary_emb.sin_cached": torch.ones(1, 1, 64, 8),
    "model.rotary_emb.inv_freq": torch.ones(4, dtype=torch.bfloat16),
    "model.transformer.blocks.0.rotary_emb.inv_freq": torch.ones(4),
    "rotary_emb.original_inv_freq": torch.ones(4),
    "model.layers.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
    "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    "model.position_ids": torch.arange(64)[None],
}


@both
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("listed", [True, False])
def test_derived_buffers_change_nothing(published, tmp_path, family, shards, listed):
    folder, _, tensors = published(family, shards=shards, tokenizer=False)
    plain = diffpo.load(folder)
    edit(
        folder, lambda t: t.update(BUFFERS), "model.safetensors" if shards == 1 else "model-00002-of-00003.safetensors"
    )
    if listed and shards > 1:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] |= dict.fromkeys(BUFFERS, "model-00002-of-00003.safetensors")
        (folder / INDEX).write_text(json.dumps(index))
    model = diffpo.load(folder)
    assert same(model, plain)
    model.save(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == tensors.keys()


def test_derived_buffers_of_an_own_checkpoint(random_model, tmp_path):
    model = random_model()
    model.save(tmp_path)
    edit(tmp_path, lambda t: t.update({"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert same(diffpo.load(tmp_path), model)


@pytest.mark.parametrize("name", ["model.layers.0.attn.bias", "model.layers.0.inv_freq_scale", "rotary_emb.weight"])
def test_a_tensor_that_may_be_a_weight_is_still_unexpected(published, name):
    folder, _, _ = published("Dream", tokenizer=False)
    edit(folder, lambda t: t.update({name: torch.ones(32)}))
    with pytest.raises(ValueError, match=rf"unexpected tensors \['{name}'\]"):
        diffpo.load(folder)


@both
@pytest.mark.parametrize("stored", ["both", "the head alone"])
def test_a_tied_head_that_is_stored(published, tmp_path, family, stored):
    embedding, head, key = NAMES[family]
    folder, _, tensors = published(family, tokenizer=False, **{key: True})
    expected = diffpo.load(folder)

    def change(t):
        t[head] = t[embedding].clone()
        if stored == "the head alone":
            del t[embedding]

    edit(folder, change)
    model = diffpo.load(folder)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert same(model, expected)
    model.save(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == tensors.keys()


@both
@pytest.mark.parametrize("other", ["one number", "shape", "dtype"])
def test_a_tied_head_that_differs_is_refused(published, monkeypatch, family, other):
    embedding, head, key = NAMES[family]
    folder, _, _ = published(family, tokenizer=False, **{key: True})
    monkeypatch.setattr("diffpo.models.stored_tensors._COMPARED_BYTES", 5000)  # many parts

    def change(t):
        t[head] = t[embedding].clone()
        if other == "one number":
            t[head][-1, -1] += 1e-3
        elif other == "shape":
            t[head] = t[head][:-1].contiguous()
        else:
            t[head] = t[head].half()

    edit(folder, change)
    with pytest.raises(ValueError, match=f"ties {head} to {embedding}.*differ"):
        diffpo.load(folder)


def test_a_tied_head_of_an_own_checkpoint(random_model, tmp_path):
    model = random_model(tie_word_embeddings=True)
    model.save(tmp_path)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["embed_tokens.weight"].clone()}))
    assert same(diffpo.load(tmp_path), model)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match=r"lm_head\.weight to embed_tokens\.weight"):
        diffpo.load(tmp_path)


@both
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "base_model.model.", "model.", "student.", "_fsdp_wrapped_module."]
)
def test_names_with_a_prefix_get_a_hint(published, family, prefix):
    folder, _, _ = published(family, tokenizer=False)
    edit(folder, lambda t: {prefix + name: tensor for name, tensor in t.items()})
    with pytest.raises(ValueError, match=f"names hold .*'{prefix}'.*take it off"):
        diffpo.load(folder)


@pytest.mark.parametrize("wrapper", ["_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_names_with_a_wrapper_inside_get_a_hint(published, wrapper):
    folder, _, _ = published("Dream", tokenizer=False)
    edit(folder, lambda t: {name.replace("mlp.", f"{wrapper}mlp."): tensor for name, tensor in t.items()})
    with pytest.raises(ValueError, match=f"names hold '{wrapper}'.*take it off"):
        diffpo.load(folder)


def test_names_without_their_prefix_get_a_hint(published):
    folder, _, _ = published("Dream", tokenizer=False)
    edit(folder, lambda t: {name.removeprefix("model."): tensor for name, tensor in t.items()})
    with pytest.raises(ValueError, match=r"lack the prefix 'model\.'"):
        diffpo.load(folder)


def test_names_that_no_prefix_explains_get_no_hint(published):
    folder, _, _ = published("Dream", tokenizer=False)
    edit(folder, lambda t: {f"{number}": tensor for number, tensor in enumerate(t.values())})
    with pytest.raises(ValueError, match="missing tensors") as caught:
        diffpo.load(folder)
    assert "the names" not in str(caught.value)


def write_adapter(folder, kind="safetensors", **settings):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8} | settings))
    if kind == "safetensors":
        save_file({"base_model.model.q_proj.lora_A.weight": torch.ones(8, 32)}, folder / "adapter_model.safetensors")
    elif kind == "bin":
        torch.save({}, folder / "adapter_model.bin")


@pytest.mark.parametrize("kind", ["bin", "config alone"])
def test_a_folder_that_is_an_adapter_says_so(tmp_path, kind):
    write_adapter(tmp_path, kind, base_model_name_or_path="GSAI-ML/LLaDA-8B-Instruct")
    with pytest.raises(ValueError, match=r"holds an adapter.*GSAI-ML/LLaDA-8B-Instruct.*merge_and_unload"):
        diffpo.load(tmp_path)


@both
@pytest.mark.parametrize("kind", ["safetensors", "bin", "config alone"])
def test_an_adapter_beside_weights_is_not_ignored(published, family, kind):
    folder, _, _ = published(family)
    write_adapter(folder, kind)
    with pytest.raises(ValueError, match=r"holds an adapter \(adapter_config\.json.*merge it"):
        diffpo.load(folder)
    (folder / "adapter_config.json").unlink()
    if kind != "config alone":
        with pytest.raises(ValueError, match=r"holds an adapter \(adapter_model"):
            diffpo.load(folder)


def test_an_adapter_beside_an_own_checkpoint_is_not_ignored(random_model, tmp_path):
    random_model().save(tmp_path)
    write_adapter(tmp_path)
    with pytest.raises(ValueError, match="holds an adapter"):
        diffpo.load(tmp_path)


def test_adapter_tensors_among_the_weights_get_a_hint(published):
    folder, _, _ = published("Dream", tokenizer=False)
    name = "model.layers.0.self_attn.q_proj"
    edit(folder, lambda t: t.update({f"{name}.lora_A.default.weight": torch.ones(8, 32)}))
    with pytest.raises(ValueError, match=r"lora_A.*merge_and_unload"):
        diffpo.load(folder)


def beside(published, family, content, **changes):
    """Shards of a whole model and, in the same folder, a single file."""
    folder, _, _ = published(family, shards=3, tokenizer=False)
    plain = diffpo.load(folder)
    if isinstance(content, bytes):
        (folder / "model.safetensors").write_bytes(content)
    else:
        save_file(content, folder / "model.safetensors")
    return folder, plain


@both
@pytest.mark.parametrize(
    "stale", [b"", b"\2\0\0\0\0\0\0\0{}", b"\xff" * 100, {}, {"model.old.weight": torch.ones(3)}], ids=repr
)
def test_whole_shards_beside_a_stale_single_file(published, family, stale):
    folder, plain = beside(published, family, stale)
    assert same(diffpo.load(folder), plain)


def test_a_whole_single_file_beside_stale_shards(published):
    folder, _, tensors = published("llada", tokenizer=False)
    plain = diffpo.load(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}))
    assert same(diffpo.load(folder), plain)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert same(diffpo.load(folder), plain)


def test_an_index_of_one_file_is_no_second_set(published):
    folder, _, tensors = published("llada", tokenizer=False)
    plain = diffpo.load(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")}))
    assert same(diffpo.load(folder), plain)


def test_two_sets_of_weights_that_both_fit_are_refused(published):
    folder, _, tensors = published("llada", shards=3, tokenizer=False)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"two sets of weights, model\.safetensors and the shards of model\.safetensors\.index"
    ):
        diffpo.load(folder)


def test_two_sets_of_weights_that_both_do_not_fit_are_both_named(published):
    folder, _ = beside(published, "llada", b"")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable.*lacks 1 of its 3 shards"):
        diffpo.load(folder)


def test_an_empty_file_beside_shards_without_an_index_names_both(published):
    folder, _ = beside(published, "llada", b"")
    (folder / INDEX).unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable.*empty.*3 shards, but not their index"):
        diffpo.load(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "consolidated.00.pth", "weights.pkl"])
def test_pickles_name_the_way_out(published, name):
    folder, _, _ = published("llada", tokenizer=False)
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(FileNotFoundError, match=rf"{name}.*convert them to safetensors.*save_file"):
        diffpo.load(folder)


def test_weights_under_another_name_get_a_hint(published):
    folder, _, _ = published("llada", tokenizer=False)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(FileNotFoundError, match=r"model\.fp16\.safetensors holds the weights, rename it"):
        diffpo.load(folder)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja", "generation_config.json"]
)
def test_a_git_lfs_pointer_says_what_to_do(published, name):
    folder, _, _ = published("llada")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16060556440\n")
    with pytest.raises(ValueError, match=f"{name} is a git-lfs pointer.*git lfs pull"):
        diffpo.load(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool, torch.int64])
def test_a_dtype_that_is_no_floating_point_number_is_named(published, dtype):
    folder, _, _ = published("Dream", tokenizer=False)
    edit(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(dtype)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight has dtype .*quantised"):
        diffpo.load(folder)
