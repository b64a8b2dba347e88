"""samples.jsonl: the same few prompts again and again while a run trains, each answer with its grade.

They are rollouts like those of an update: the run's rule, temperature and rewards. The problems and every draw are keyed by the run's seed
and the prompt's number, never by the update, so that two answers to a prompt differ because the model does.
"""

import math
from pathlib import Path

from diffpo.decoding.generation import decode_text
from diffpo.keyed_random import derive
from diffpo.models.special_tokens import special_tokens
from diffpo.runs.json_lines import JsonLines, own_file
from diffpo.trace import token_pieces
from diffpo.training.rollout import Rollout
from diffpo.training.trainer import Trainer

NAME = "samples.jsonl"
_SAMPLES = 2  # purpose in the random key, beside the trainer's


class Samples:
    """Appends to samples.jsonl. On a resume what is after the checkpoint is dropped, and what is there is not drawn again.

    off: none are drawn any more, because the task or a reward failed; that ends no run.
    """

    def __init__(self, trainer: Trainer, folder: Path, finished_updates: int = 0):
        self.trainer, self.settings, self.off = trainer, trainer.config.samples, False
        self._lines: JsonLines | None = None  # in the first process, which writes
        if self.settings.every and trainer.world.first:
            self._lines = read_samples(folder)
            self._lines.keep(sum(row["update"] <= finished_updates for row in self._lines.rows))

    def due(self, update: int) -> bool:
        return bool(self.settings.every) and not self.off and update % self.settings.every == 0

    def draw(self) -> str:
        """Ask the model of now, unless it has been asked. Why that failed, for the reader, else "". OSError when the disk cannot take the
        answers."""
        trainer = self.trainer
        if not self.settings.every or self.off:
            return ""
        # no more than an update asks for: there are so many
        count = min(self.settings.count, trainer.config.algorithm.prompts_per_update)
        missing = trainer.world.from_first(lambda: self._missing(count))
        if not missing:
            return ""
        seed = derive(trainer.config.seed, _SAMPLES)
        try:
            rollout = trainer.collect(prompts=count, group_size=1, seed=seed, update=0, first=0)
        except Exception as error:  # of the task's own code, whatever it is
            if isinstance(error, OSError | MemoryError | FloatingPointError):
                raise
            self.off = True
            return " ".join(f"{type(error).__name__}: {error}".split())
        if self._lines is not None:
            for index in missing:
                self._lines.write({"update": trainer.update, **sample_record(trainer, rollout, index)})
        return ""

    def _missing(self, count: int) -> list[int]:
        rows = self._lines.rows if self._lines is not None else []
        there = {row["index"] for row in rows if row["update"] == self.trainer.update}
        return sorted(set(range(count)) - there)

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()


def sample_record(trainer: Trainer, rollout: Rollout, index: int) -> dict:
    """One rollout as JSON values.

    prompt: as the model read it, with special tokens. completion: without them. reward: at the price of time, task_reward: the task's;
    null = dropped. correct: null = undecided. gamma: nats, null for rules without one. length: tokens up to and including the first EOS;
    pieces: the text of each of them, special: whether it is a special token, commit_step: when it was committed.
    """
    row = rollout.trajectory[index : index + 1]
    length, tokenizer = int(row.length), trainer.model.tokenizer
    assert tokenizer is not None  # the prompts are texts, which take one
    prompt, tokens = row.prompt_ids[row.prompt_mask].tolist(), row.tokens[0, :length].tolist()
    special, gamma = special_tokens(tokenizer), float(row.gamma)
    decided = bool(rollout.correct[index] | rollout.wrong[index])
    return {
        "index": index,
        "prompt": "".join(token_pieces(prompt, tokenizer)),
        "completion": decode_text(trainer.model, row)[0],
        "reward": number(float(rollout.reward[index])),
        "task_reward": number(float(rollout.task_reward[index])),
        "correct": bool(rollout.correct[index]) if decided else None,
        "nfe": int(row.nfe),
        "gamma": number(gamma) if not math.isinf(gamma) else "inf",
        "length": length,
        "pieces": token_pieces(tokens, tokenizer),
        "special": [int(token in special) for token in tokens],
        "commit_step": row.commit_step[0, :length].tolist(),
    }


def number(value: float) -> float | None:
    """fp32 0.1 as 0.1, null for what is no number."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def read_samples(folder: Path) -> JsonLines:
    """samples.jsonl of a run's folder, made if it is not there; ValueError unless its rows are samples in the order of the updates."""
    path = folder / NAME
    lines = JsonLines(own_file(path), str(path), "sample")
    before = (-1, -1)
    for place, row in enumerate(lines.rows):
        update, index = row.get("update"), row.get("index")
        if type(update) is not int or type(index) is not int or (update, index) <= before:
            raise lines.refused(place)
        before = (update, index)
    return lines
