"""Adapters of peft: a model with them decodes, scores, trains and saves as the plain model with their weights merged does."""

import copy
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

import diffpo
from diffpo.models.checkpoints import read_weights, save_checkpoint

peft = pytest.importorskip("peft", reason="needs the extra diffpo[lora]")

INNER = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "inner": {"target_modules": INNER},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "trained head": {"target_modules": INNER, "modules_to_save": ["lm_head"]},
    "inner DoRA": {"target_modules": INNER, "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "threshold": {"target_modules": ["q_proj"], "modules_to_save": ["threshold"]},
}
every_adapter = pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS.keys())
PROMPTS = [torch.tensor([4, 5, 6]), torch.tensor([7, 8, 9, 10, 11])]


def adapted(model, **settings):
    """The model in a PeftModel whose adapters do something."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, **settings)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def merged(wrapped):
    """The plain model that peft makes of it."""
    return copy.deepcopy(wrapped).merge_and_unload()


def decoded(model, **changes):
    arguments = {"gen_length": 6, "block_length": 3, "rule": diffpo.EntropyBounded(1.5), "temperature": 0.8, "seed": 3}
    return diffpo.generate(model, PROMPTS, **arguments | changes)


def assert_alike(model, plain):
    """The same logits, tokens and log-probs."""
    tokens = torch.arange(3, 12)[None]
    torch.testing.assert_close(model.logits(tokens), plain.logits(tokens), rtol=1e-4, atol=1e-4)
    trajectory = decoded(plain).trajectory
    assert torch.equal(decoded(model).tokens, trajectory.tokens)
    for boundaries in ([0], [0, 2]):
        expected = diffpo.trajectory_logprobs(plain, trajectory, boundaries)
        torch.testing.assert_close(
            diffpo.trajectory_logprobs(model, trajectory, boundaries), expected, rtol=1e-4, atol=1e-4
        )


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@every_adapter
def test_an_adapted_model_is_the_merged_one(random_model, settings):
    base = random_model(1, threshold_gammas=(0.5, 2.0))
    before = copy.deepcopy(base)
    model = adapted(base, **settings)
    assert_alike(model, merged(model))
    assert_alike(model.get_base_model(), merged(model))
    tokens = torch.arange(3, 12)[None]
    if "threshold" not in settings.get("modules_to_save", []):
        assert (model.logits(tokens) - before.logits(tokens)).abs().max() > 0.1, "the adapters must do something"
    with model.disable_adapter():
        assert_alike(model, before)


def test_a_learned_threshold_is_read_through_its_adapter(random_model):
    model = adapted(
        random_model(1, threshold_gammas=(0.5, 2.0)), target_modules=["q_proj"], modules_to_save=["threshold"]
    )
    plain = merged(model)
    rule = diffpo.PromptThreshold(sample=True)
    assert torch.equal(decoded(model, rule=rule).trajectory.gamma, decoded(plain, rule=rule).trajectory.gamma)


def test_a_tied_head_with_an_adapter_scores_but_is_not_saved(random_model, tmp_path):
    base = random_model(2, tie_word_embeddings=True)
    model = adapted(base, target_modules=["lm_head", "q_proj"])
    plain = random_model(0)
    merged_head = base.lm_head.get_base_layer().weight + base.lm_head.get_delta_weight("default")
    inner = merged(adapted_without_head(model, random_model))
    plain.load_state_dict(inner.state_dict() | {"lm_head.weight": merged_head.detach()})
    assert_alike(model, plain.eval())
    with pytest.raises(ValueError, match=r"tied.*lm_head.*tie_word_embeddings"):
        save_checkpoint(model, tmp_path / "tied")
    assert not (tmp_path / "tied").exists()


def adapted_without_head(model, random_model):
    other = peft.get_peft_model(
        random_model(2, tie_word_embeddings=True), peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_" in name:
                parameter.copy_(own[name])
    return other


@pytest.mark.parametrize("merged_now", [False, True])
def test_merged_adapters_count_once(random_model, tmp_path, merged_now):
    model = adapted(random_model(1), **ADAPTERS["head"])
    plain = merged(model)
    if merged_now:
        model.merge_adapter()
    assert_alike(model, plain)
    save_checkpoint(model, tmp_path)
    assert_alike(diffpo.load(tmp_path), plain)
    if merged_now:
        model.unmerge_adapter()
    assert_alike(model, plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"lora_dropout": 0.5}, "lora_dropout"),
    ],
    ids=["DoRA", "bias", "dropout"],
)
def test_what_a_head_cannot_have_is_refused(random_model, settings, message):
    if "lora_bias" in settings:
        base = random_model(1)
        base.lm_head = torch.nn.Linear(32, 40)
        model = adapted(base, target_modules=["lm_head"], **settings)
    else:
        model = adapted(random_model(1), target_modules=["lm_head"], **settings)
    trajectory = decoded(model).trajectory
    model.train()
    with pytest.raises(ValueError, match=f"lm_head.*{message}.*modules_to_save"):
        diffpo.trajectory_logprobs(model, trajectory, [0])


@pytest.mark.parametrize("settings", [ADAPTERS[name] for name in ("inner", "head", "trained head")], ids=str)
@pytest.mark.parametrize("tokens_at_once", [None, 11])
def test_the_gradient_is_that_through_the_merged_weights(random_model, settings, tokens_at_once):
    base = random_model(1).double()
    model = adapted(base, **settings).double()
    plain = merged(model).requires_grad_()
    trajectory = decoded(plain).trajectory
    advantage = torch.tensor([1.0, -0.5])
    # here, as they need pydantic, which a machine that only decodes may lack
    from diffpo.objectives import OBJECTIVES, Batch
    from diffpo.training.update import accumulate_gradient

    objective = OBJECTIVES["diffpo"](OBJECTIVES["diffpo"].Config(kl_coefficient=0, group_size=2))
    batch = Batch(trajectory, advantage, advantage)
    latents = objective.latents(batch, 0)
    for one in (model, plain):
        accumulate_gradient(
            one, objective, batch, latents, objective.signal(batch, None, None), None, None, tokens_at_once
        )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    weights = dict(plain.named_parameters())
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):  # W + s B A: the slopes of A and B by the chain rule
            slope, s = weights[f"{name}.weight"].grad, module.scaling["default"]
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            torch.testing.assert_close(A.grad, s * B.T @ slope, rtol=1e-7, atol=1e-10)
            torch.testing.assert_close(B.grad, s * slope @ A.T, rtol=1e-7, atol=1e-10)
    if "modules_to_save" in settings:
        own = base.lm_head.modules_to_save["default"].weight.grad
        torch.testing.assert_close(own, weights["lm_head.weight"].grad, rtol=1e-7, atol=1e-10)


@every_adapter
@pytest.mark.parametrize("disabled", [False, True], ids=["active", "disabled"])
def test_what_is_saved_is_the_merged_model(random_model, tmp_path, settings, disabled):
    base = random_model(1, threshold_gammas=(0.5, 2.0))
    original = copy.deepcopy(base)
    model = adapted(base, **settings)
    before = state(model)
    with model.disable_adapter() if disabled else nullcontext():
        save_checkpoint(model, tmp_path / "wrapped")
        model.save(tmp_path / "inner")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    (original if disabled else merged(model)).save(tmp_path / "plain")
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    for name in ("wrapped", "inner"):
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == files
        for file in files:
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    assert_alike(diffpo.load(tmp_path / "wrapped"), original if disabled else merged(model))


@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_published_formats_are_saved_merged(published, tmp_path, family):
    folder, _, _ = published(family)
    model = adapted(diffpo.load(folder), target_modules=INNER, modules_to_save=["lm_head"])
    plain = merged(model)
    save_checkpoint(model, tmp_path / "merged")
    loaded, names = diffpo.load(tmp_path / "merged"), load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert names
    assert not any("lora" in name or "base_layer" in name for name in names)
    assert loaded.config == plain.config
    tokens = torch.arange(3, 12)[None]
    torch.testing.assert_close(loaded.logits(tokens), model.logits(tokens), rtol=1e-4, atol=1e-4)
    expected = plain.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_weights_are_not_read_into_a_model_with_adapters(random_model, tmp_path):
    random_model(1).save(tmp_path)
    model = adapted(random_model(1), target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"adapters.*q_proj"):
        read_weights(model.get_base_model(), tmp_path)
