"""A training's folder made by hand: no model is needed to read one."""

import json
from pathlib import Path

import pytest

HOSTILE = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2"><!-- &lt; \u2028 {{ 7 * 7 }} \x1b[31m\x00\x07\u202e'


def line(update: int, **changes) -> dict:
    made = {
        "update": update, "reward": 0.2 + update / 100, "accuracy": 0.1 + update / 100, "nfe": 4 - update / 20, "gamma": 2.5,
        "gamma_histogram": [40 - update, 10, 10, 4 + update], "loss": -0.1, "kl": None, "denoiser_calls": 100 * update,
        "skipped_updates": 0, "seconds/rollout": 1.0, "seconds/score": 0.25, "seconds/update": 0.75,
    }  # fmt: skip
    return made | changes


def sample(update: int, index: int, **changes) -> dict:
    made = {
        "update": update, "index": index, "prompt": f"prompt {index}", "completion": "a b c", "reward": 0.5, "task_reward": 1.0,
        "correct": update > 0, "nfe": 2, "gamma": 2.0, "length": 4, "pieces": ["a", " b", " c", "<eos>"], "special": [0, 0, 0, 1],
        "commit_step": [1, 2, 1, 2],
    }  # fmt: skip
    return made | changes


def evaluation(rule: str, accuracy: float, nfe: float, **changes) -> dict:
    made = {"rule": rule, "accuracy": accuracy, "nfe": nfe, "gamma": None, "decoding_seconds": 3.0,
            "accuracy_interval_95": [accuracy - 0.05, accuracy + 0.05]}  # fmt: skip
    return made | changes


def summary(updates: int) -> dict:
    base = [evaluation("FixedSchedule(steps=12)", 0.36, 12.0), evaluation("EntropyBounded(gamma=2)", 0.1, 3.0)]
    trained = [evaluation("PromptThreshold()", 0.5, 1.85, gamma=2.5), evaluation("FixedSchedule(steps=12)", 0.4, 12.0)]
    kind = {"problems": 50, "base_careful": 0.9, "careful": 0.8, "accuracy": 0.1, "nfe": 1.5, "gamma": 4.0}
    return {
        "base": {"one_at_a_time": {"accuracy": 0.36, "nfe": 12.0}, "best": {"rule": "Best()", "accuracy": 0.38, "nfe": 8.0}},
        "trained": {"accuracy": 0.5, "nfe": 1.85, "gamma": 2.5}, "kinds": {"easy": kind | {"accuracy": 0.9}, "hard": kind},
        "lost": [{"kind": "hard", "problems": 50, "base": 0.9, "now": 0.1, "gamma": 4.0}],
        "heldout": 100, "updates": updates, "denoiser_calls": 4321, "sweep": {"base": base, "trained": trained},
        "provenance": {"command": "python -m diffpo.train", "versions": {"torch": "2.13.0"}, "git_commit": None},
    }  # fmt: skip


def settings(**changes) -> dict:
    made = {
        "name": "first", "task": "countdown", "model": "tiny-countdown", "updates": 40,
        "algorithm": {"name": "diffpo", "train": ["model", "threshold"], "prompts_per_update": 4, "group_size": 8},
        "rollout": {"threshold_gammas": None, "speed_exponent": 1.0}, "optimizer": {"lr": 0.0002},
    }  # fmt: skip
    return made | changes


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, updates, finished, **contents): the folder of a run; contents by file, None: the file is not there."""

    def make(name: str = "first", updates: int = 40, finished: bool = True, **contents) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        files = {
            ".diffpo-run": {"format": 1, "command": "train", "begun": True, "inputs": {"model": f"sha256:{name}"}},
            "config.json": settings(name=name),
            "metrics.jsonl": [line(n) for n in range(1, updates + 1)],
            "samples.jsonl": [sample(u, i) for u in (0, 20, 40) for i in range(2)],
            "base.json": {"heldout": [evaluation("FixedSchedule(steps=12)", 0.36, 12.0)], "watched": None},
            "summary.json": summary(updates) if finished else None,
        } | {key.replace("__", "."): value for key, value in contents.items()}  # fmt: skip
        for file, content in files.items():
            if isinstance(content, str):
                (folder / file).write_text(content)
            elif content is not None:
                lines = content if isinstance(content, list) else [content]
                (folder / file).write_text("".join(json.dumps(each) + "\n" for each in lines))
        return folder

    return make
