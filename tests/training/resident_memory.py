"""``python resident_memory.py FOLDER``: the resident memory that a LoRA update takes in this process, and its estimate, in bytes, as JSON."""

import json
import sys
from pathlib import Path

import peft  # noqa: F401  # so that it is there before the first look
import torch

from diffpo import Grade, MaskedDiffusionLM, ModelConfig
from diffpo.cpu_memory import keep_freed_memory
from diffpo.models.checkpoints import open_checkpoint
from diffpo.models.word_tokenizer import word_tokenizer
from diffpo.tasks import Task
from diffpo.tasks.prompts import prompt_ids
from diffpo.tasks.task import Lengths
from diffpo.training.config import TrainConfig
from diffpo.training.memory_estimate import estimate_memory
from diffpo.training.model_setup import loaded
from diffpo.training.trainer import Trainer

WORDS = 8000


class Words(Task):
    """Every text has a reward of its own."""

    name = "words"

    def problems(self, split, count, seed):
        return list(range(count))

    def prompt(self, problem):
        return " ".join(f"w{problem * 8 + i}" for i in range(8))

    def grade(self, problem, text):
        return Grade(float(sum(map(ord, text)) % 7), False)


def write_model(folder: Path, width: int) -> None:
    config = ModelConfig(vocab_size=WORDS + 3, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=8,
                         num_attention_heads=8, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, mask_token_id=2)  # fmt: skip
    torch.manual_seed(0)
    MaskedDiffusionLM(config, word_tokenizer([f"w{i}" for i in range(WORDS)])).to(torch.bfloat16).save(folder)


def status(name: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measured(folder: Path) -> dict[str, int]:
    config = TrainConfig(
        updates=2, heldout=1, lora={"rank": 16},
        algorithm={"name": "d1", "prompts_per_update": 8, "group_size": 4, "inner_updates": 1},
        rollout={"gen_length": 24, "block_length": 24, "rule": "fixed", "steps": 2},
    )  # fmt: skip
    checkpoint, task = open_checkpoint(folder), Words()
    (prompt,) = prompt_ids(checkpoint.model.tokenizer, task, [0])
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # VmHWM starts again
    before = status("VmRSS")
    estimate = estimate_memory(config, checkpoint.model, len(prompt), Lengths(24, 24))
    trainer = Trainer(config, loaded(config, checkpoint, torch.device("cpu")), task)
    for _ in range(2):
        assert trainer.step()["updated"]
    return {"measured": status("VmHWM") - before, "estimate": estimate.peak - estimate.process}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    keep_freed_memory(10**9)  # as a large model: what is freed goes back at once
    write_model(folder / "small", 64)
    write_model(folder / "large", 640)
    measured(folder / "small")  # the libraries' code is in memory from here on
    print(json.dumps(measured(folder / "large")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
