"""ModelConfig by itself: what it takes, what it refuses and how it says so. In config.json: test_checkpoints, test_checkpoint_formats."""

import copy
import json
import pickle
import sys
import time

import numpy as np
import pytest

from diffpo import ModelConfig

FIELDS = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "mask_token_id": 2,
}


def fault(**changes) -> str:
    with pytest.raises(ValueError, match=":") as caught:
        ModelConfig(**FIELDS | changes)
    return str(caught.value)


def test_defaults_and_equality():
    config = ModelConfig(**FIELDS)
    assert (config.model_type, config.rms_norm_eps, config.rope_theta, config.max_position_embeddings) == (
        "diffpo",
        1e-5,
        10000.0,
        4096,
    )
    assert (config.head_dim, config.key_value_heads) == (8, 4)
    assert config == ModelConfig(**FIELDS) != ModelConfig(**FIELDS | {"vocab_size": 41})
    assert len({config, ModelConfig(**FIELDS)}) == 1
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_a_number_is_kept_in_the_fields_type():
    config = ModelConfig(
        **FIELDS
        | {"vocab_size": np.int32(40), "rope_theta": 500000, "pad_token_id": np.int64(3), "threshold_gammas": [0, 1.5]}
    )
    assert (config.vocab_size, type(config.vocab_size)) == (40, int)
    assert type(config.rope_theta) is float
    assert type(config.pad_token_id) is int
    assert config.threshold_gammas == (0.0, 1.5)
    assert ModelConfig(**FIELDS | {"threshold_gammas": []}).threshold_gammas is None


@pytest.mark.parametrize("gammas", [None, (0.0, 0.25, float("inf"))])
def test_through_json_and_back(gammas):
    config = ModelConfig(**FIELDS, eos_token_id=1, attention_bias=True, threshold_gammas=gammas)
    text = json.dumps(config.model_dump())
    assert ModelConfig(**json.loads(text)) == config
    assert list(json.loads(text))[:2] == ["model_type", "vocab_size"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("hidden_size", "32", "Input should be a valid integer, got '32'"),
        ("hidden_size", 32.5, "Input should be a valid integer, got 32.5"),
        ("num_hidden_layers", True, "Input should be a valid integer, got True"),
        ("num_hidden_layers", None, "Input should be a valid integer, got None"),
        ("vocab_size", 2**62, "at least 1 and below 2^30"),
        ("intermediate_size", -3, "at least 1 and below 2^30, got -3"),
        ("eos_token_id", -1, "at least 0"),
        ("pad_token_id", [0], r"valid integer, got [0]"),
        ("rms_norm_eps", "1e-5", "valid number, got '1e-5'"),
        ("rms_norm_eps", float("inf"), "finite number above 0, got inf"),
        ("rope_theta", float("nan"), "finite number above 0, got nan"),
        ("rope_theta", 10**400, "finite number, got an integer of 1329 bits"),
        ("attention_bias", 1, "true or false, got 1"),
        ("tie_word_embeddings", "yes", "true or false, got 'yes'"),
        ("model_type", 3, "valid string, got 3"),
        ("threshold_order", "entropie", "entropy, confidence or margin, got 'entropie'"),
        ("threshold_gammas", 0.5, "list of numbers (nats), got 0.5"),
        ("threshold_gammas", [0.5, "1"], "valid number"),
        ("threshold_gammas", [0.5, -0.1], "at least 0 (nats)"),
    ],
)
def test_what_does_not_fit_is_named_with_the_value(name, value, said):
    message = fault(**{name: value})
    assert message.startswith(f"{name}: ")
    assert said in message


def test_the_order_of_a_threshold_by_its_old_name():
    old = ModelConfig(**FIELDS, threshold_proxy="margin")
    assert old == ModelConfig(**FIELDS, threshold_order="margin")
    assert old.threshold_proxy == "margin"
    assert "threshold_proxy" not in old.model_dump()
    with pytest.raises(ValueError, match="threshold_proxy is now called threshold_order"):
        ModelConfig(**FIELDS, threshold_order="margin", threshold_proxy="margin")


def test_every_fault_is_told_at_once():
    message = fault(hidden_sise=32, num_hidden_layers=0, rope_theta="x")
    assert "unknown field 'hidden_sise'; nearest: hidden_size" in message
    assert "num_hidden_layers: " in message
    assert "rope_theta: " in message
    with pytest.raises(ValueError, match=r"vocab_size: Field required.*mask_token_id: Field required"):
        ModelConfig()


def test_hostile_values_are_told_shortly_and_at_once():
    deep: list = []
    for _ in range(sys.getrecursionlimit() // 2):
        deep = [deep]
    started = time.perf_counter()
    message = fault(
        **{"self": 1, "x" * 10**6: 2}, **{f"key{i}": i for i in range(10**5)}, hidden_size="9" * 10**6, vocab_size=deep
    )
    assert len(message) < 2000
    assert time.perf_counter() - started < 2


def test_a_copy_with_other_values_is_checked():
    config = ModelConfig(**FIELDS)
    assert config.model_copy(update={"vocab_size": 41}).vocab_size == 41
    with pytest.raises(ValueError, match="mask_token_id 2 is outside"):
        config.model_copy(update={"vocab_size": 2})
    with pytest.raises(ValueError, match="vocab_sise"):
        config.model_copy(update={"vocab_sise": 2})
