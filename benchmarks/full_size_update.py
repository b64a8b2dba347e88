"""``python benchmarks/full_size_update.py FOLDER [--smoke] [--out file.json]``: one whole LoRA update of a model of LLaDA-8B's size.

FOLDER gets a random LLaDA-8B in the published format (bf16, 16 GB, six shards; made once), with a stand-in for its tokenizer: bytes, words
that fill the vocabulary, LLaDA's special tokens at their ids and its chat template. Then, on the CPU and as a run does it: a chat prompt,
4 rollouts of 32 tokens, their rewards, a rank-8 update with activation checkpointing, the saved adapter. Printed are the estimate of
memory, the measured peak (resident memory of the whole process) and the minutes. Exit code 1 if they differ by more than 15%.

Loss and gradient mean nothing here: a random network of 32 layers turns the last bit of bf16 into nats, and on a CPU attention with a
gradient is computed in fp32, without one in bf16.

It needs 17 GB of disk and about 18 GB of free memory, and refuses to start without. --smoke: a tiny model, for tests of this program.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from decoding_cases.random_models import SHAPES, Shape, deviation
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from diffpo import Grade, MaskedDiffusionLM
from diffpo.cpu_memory import keep_freed_memory
from diffpo.models.adapter_folder import adapter_in
from diffpo.models.adapter_saving import save_adapter
from diffpo.models.checkpoints import open_checkpoint, write_atomically
from diffpo.models.formats.llada import LLADA
from diffpo.models.model_config import ModelConfig
from diffpo.runs.provenance import provenance
from diffpo.tasks import Task
from diffpo.training.config import TrainConfig
from diffpo.training.model_setup import loaded
from diffpo.training.plan import planned
from diffpo.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results" / "full_size_update_cpu.json"
SHARDS, SEED, WITHIN = 6, 0, 0.15
FIRST_SPECIAL, LAST_SPECIAL = 126_080, 126_348
SPECIAL = {126_080: "<|startoftext|>", 126_081: "<|endoftext|>", 126_336: "<|mdm_mask|>", 126_346: "<|start_header_id|>",
           126_347: "<|end_header_id|>", 126_348: "<|eot_id|>"}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


class Question(Task):
    """One question in chat form. A random model answers nonsense, of which every text has a reward of its own."""

    name = "question"

    def problems(self, split, count, seed):
        return list(range(count))

    def prompt(self, problem):
        return [{"role": "user", "content": f"What is {12 + problem} times 21?"}]

    def grade(self, problem, text):
        return Grade(float(sum(map(ord, text)) % 97), False)


def make_model(folder: Path, shape: Shape) -> None:
    """Random weights by the names of the published files; a shard at a time is in memory. Nothing is done where it is already there."""
    marker = folder / "model.safetensors.index.json"
    if marker.exists():
        return
    config = ModelConfig(
        **shape.config.model_dump() | {"model_type": "llada", "eos_token_id": 126_081, "pad_token_id": 126_081}
    )
    with torch.device("meta"):
        sizes = {name: weight.shape for name, weight in MaskedDiffusionLM(config).named_parameters()}
    total = 2 * sum(size.numel() for size in sizes.values())
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < 1.1 * total:
        raise SystemExit(f"error: {folder}: the model needs {total / 1e9:.0f} GB of disk, {free / 1e9:.0f} GB are free")
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(LLADA.fields(config) | {"torch_dtype": "bfloat16"}, indent=1))
    generator, shards, filled = torch.Generator().manual_seed(SEED), [], 0
    for name, size in sizes.items():
        if filled * SHARDS >= len(shards) * total:
            shards.append([])
        shards[-1].append(name)
        filled += 2 * size.numel()
    where = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        where |= {LLADA.tensor_name(name): file for name in names}
        save_file({LLADA.tensor_name(name): drawn(name, sizes[name], generator) for name in names}, folder / file)
        print(f"made {file}", flush=True)
    marker.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))


def drawn(name: str, size: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    weight = torch.empty(size, dtype=torch.bfloat16)
    weight.normal_(0.0, deviation(name, weight), generator=generator)
    if name == "lm_head.weight":
        weight[126_336] = 0.0  # a trained model does not propose the mask
    return weight


def write_tokenizer(folder: Path) -> None:
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"word{index}" for index in range(len(words), FIRST_SPECIAL)]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = [SPECIAL.get(index, f"<|reserved_token_{index}|>") for index in range(FIRST_SPECIAL, LAST_SPECIAL + 1)]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
                "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def update(folder: Path, smoke: bool) -> dict:
    """What one update was estimated to take and took: bytes and minutes."""
    config = TrainConfig(
        model=str(folder), device="cpu", updates=1, heldout=1, lora={"rank": 8},
        algorithm={"name": "diffpo", "train": ("model",), "prompts_per_update": 1, "group_size": 4, "inner_updates": 1},
        rollout={"gen_length": 32, "block_length": 32, "rule": "fixed", "steps": 8, "speed_exponent": 0},
        update={"activation_checkpointing": True},
    )  # fmt: skip
    started, task = time.perf_counter(), Question()
    checkpoint = open_checkpoint(folder)
    plan = planned(config, checkpoint, task, task.problems("train", 1, 0), torch.device("cpu"))
    print(plan.estimate.table(), flush=True)
    available = memory("/proc/meminfo", "MemAvailable")
    if not smoke and available < plan.estimate.peak:
        raise SystemExit(
            f"error: {plan.estimate.peak / 1e9:.1f} GB of memory are needed, {available / 1e9:.1f} GB are free"
        )
    keep_freed_memory(plan.estimate.weights)
    trainer = Trainer(config, loaded(config, checkpoint, torch.device("cpu")), task)
    times = {"load": time.perf_counter() - started}
    print(f"loaded in {times['load']:.0f} s", flush=True)
    metrics = trainer.step()
    assert metrics["updated"], "the rewards of all rollouts were equal"
    times |= {name.removeprefix("seconds/"): value for name, value in metrics.items() if name.startswith("seconds/")}
    adapter = folder.with_name(f"{folder.name}-adapter")
    save_adapter(trainer.model, adapter)
    found = adapter_in(adapter)
    assert found is not None
    assert len(found.pairs(checkpoint.model)) == 7 * checkpoint.model.config.num_hidden_layers
    return {
        "estimate_bytes": plan.estimate.peak,
        "peak_bytes": memory("/proc/self/status", "VmHWM"),
        "adapter_bytes": sum(file.stat().st_size for file in adapter.iterdir()),
        "minutes": (time.perf_counter() - started) / 60,
        "seconds": {name: round(value, 1) for name, value in times.items()},
        "metrics": {name: metrics[name] for name in ("loss", "gradient_norm", "nfe", "reward", "denoiser_calls")},
    }


def memory(file: str, name: str) -> int:
    with open(file) as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.nice(5)
    Path("/proc/self/oom_score_adj").write_text("1000")  # where memory is short, this is what ends
    load_before = os.getloadavg()
    make_model(options.folder, Shape(64, 192, 2, 4) if options.smoke else SHAPES["llada-8b"])
    found = update(options.folder, options.smoke)
    ratio = found["estimate_bytes"] / found["peak_bytes"]
    print(f"estimated {found['estimate_bytes'] / 1e9:.2f} GB, measured {found['peak_bytes'] / 1e9:.2f} GB (ratio {ratio:.2f}), "
          f"{found['minutes']:.1f} minutes")  # fmt: skip
    out = options.out or (None if options.smoke else RESULTS)
    if out is not None:
        origin = provenance({"weights": SEED, "run": 0})
        document = {
            "method": __doc__,
            "run": origin | {"load_average": [load_before, os.getloadavg()]},
            "update": found,
        }
        write_atomically(out, lambda path: Path(path).write_text(json.dumps(document, indent=1) + "\n"))
    return 0 if options.smoke or abs(ratio - 1) <= WITHIN else 1


if __name__ == "__main__":
    sys.exit(main())
