"""Shards and their index: read strictly, within the memory of one model, and written so that other tools read them."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffpo
from diffpo.models import stored_tensors
from diffpo.models.checkpoints import save_checkpoint

INDEX = "model.safetensors.index.json"
both = pytest.mark.parametrize("family", ["llada", "Dream"])


@both
def test_shards_hold_the_same_model_as_one_file(published, family):
    whole = diffpo.load(published(family, "whole")[0])
    folder, _, _ = published(family, "sharded", shards=3)
    assert len(list(folder.glob("model-0000?-of-00003.safetensors"))) == 3
    sharded = diffpo.load(folder)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(sharded.state_dict()[name], tensor), name


def test_a_mapped_file_is_left_after_a_bounded_number_of_bytes(published, monkeypatch):
    """Small bounds must change nothing but the number of times that the file is opened."""
    folder, _, tensors = published("llada")
    opened, safe_open = [], stored_tensors.safe_open
    monkeypatch.setattr(stored_tensors, "safe_open", lambda *a, **k: opened.append(a) or safe_open(*a, **k))
    monkeypatch.setattr(stored_tensors, "_MAPPED_BYTES", 10_000)
    model = diffpo.load(folder)
    assert 10 < len(opened) < len(tensors)  # the two largest tensors, of 40 kB each, come alone
    assert torch.equal(model.lm_head.weight, tensors["model.transformer.ff_out.weight"])


def test_large_models_are_written_in_shards_and_replaced_by_small_ones(published, tmp_path):
    folder, _, tensors = published("llada")
    model = diffpo.load(folder)
    save_checkpoint(model, tmp_path / "out", shard_bytes=60_000)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all((tmp_path / "out" / name).stat().st_size < 70_000 for name in shards)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "out" / file)[name], tensors[name])
    again = diffpo.load(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    model.save(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("model[.-]*")] == ["model.safetensors"], (
        "old shards were left"
    )
    save_checkpoint(model, tmp_path / "out", shard_bytes=60_000)
    assert not (tmp_path / "out/model.safetensors").exists(), "the old single file would hide the shards"


def remove_a_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def remove_the_index(folder):
    (folder / INDEX).unlink()


def edit_index(change):
    def edit(folder):
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def edit_shard(change):
    def edit(folder):
        path = folder / "model-00001-of-00003.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


def truncate(folder):
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


WTE, NORM = "model.transformer.wte.weight", "model.transformer.ln_f.weight"
FAULTS = {
    "missing shard": (remove_a_shard, FileNotFoundError, r"lacks 1 of its 3 shards: model-00002-of-00003\.safetensors"),
    "missing index": (remove_the_index, FileNotFoundError, r"lacks model\.safetensors\.index\.json.*3 shards"),
    "index is no JSON": (lambda f: (f / INDEX).write_text("{"), ValueError, r"index\.json is not valid JSON"),
    "no weight map": (edit_index(lambda i: i.pop("weight_map")), ValueError, "has no weight_map"),
    "index leaves the folder": (
        edit_index(lambda i: i["weight_map"].update({WTE: "../model.safetensors"})), ValueError, r"\.\./model\.safetensors",
    ),
    "index names a pickle": (
        edit_index(lambda i: i["weight_map"].update({WTE: "model.bin"})), ValueError, r"'model\.bin'",
    ),
    "tensor not in its shard": (edit_shard(lambda t: t.pop(NORM)), ValueError, rf"00001.*missing tensors \['{NORM}'\]"),
    "tensor not in the index": (
        edit_shard(lambda t: t.update(stray=torch.zeros(1))), ValueError, r"unexpected tensors \['stray'\]",
    ),
    "tensor in neither": (
        lambda f: (edit_shard(lambda t: t.pop(NORM))(f), edit_index(lambda i: i["weight_map"].pop(NORM))(f)),
        ValueError, rf"missing tensors \['{NORM}'\]",
    ),
    "another shape": (
        edit_shard(lambda t: t.update({NORM: torch.ones(31)})), ValueError, rf"{NORM} has shape \[31\], the config needs \[32\]",
    ),
    "integers": (
        edit_shard(lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)})), ValueError, f"{NORM} has dtype I8.*quantised",
    ),
    "truncated shard": (truncate, ValueError, r"model-00002-of-00003\.safetensors is not a readable"),
}  # fmt: skip


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_is_named_before_memory_is_allocated(published, monkeypatch, fault):
    damage, kind, message = FAULTS[fault]
    folder, _, _ = published("llada", shards=3, tokenizer=False)
    damage(folder)
    monkeypatch.setattr("diffpo.models.checkpoints._allocate", lambda *a: pytest.fail("memory was allocated"))
    with pytest.raises(kind, match=message):
        diffpo.load(folder)


def test_a_pickle_beside_a_published_config_is_refused(published):
    folder, _, tensors = published("llada", tokenizer=False)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model-00001-of-00001.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model-00001-of-00001\.bin.*refused.*safetensors"):
        diffpo.load(folder)


MEASURE = """
    import sys
    import torch, diffpo

    def anonymous():  # what the kernel cannot take back, in bytes
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

    def resident():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

    diffpo.load(sys.argv[1])  # imports and caches
    most = [0]
    copy = torch.Tensor.copy_

    def watched(self, *arguments, **options):
        result = copy(self, *arguments, **options)
        most[0] = max(most[0], anonymous())
        return result

    torch.Tensor.copy_ = watched
    for dtype in (torch.float32, torch.bfloat16):
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")  # VmHWM starts again
        most[0], before, start = 0, anonymous(), resident()
        model = diffpo.load(sys.argv[2], dtype=dtype)
        print(most[0] - before, resident() - start, sum(p.nbytes for p in model.parameters()))
        del model
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_the_memory_of_one_model(published):
    """A model of 100 MB in fp32, the largest tensor 16 MB; as stored, and converted to half of the size."""
    small, _, _ = published("llada", "small", tokenizer=False)
    large, _, _ = published(
        "llada", "large", shards=4, tokenizer=False, d_model=512, n_heads=8, n_kv_heads=8, n_layers=4, mlp_hidden_size=1536,
        embedding_size=8192, vocab_size=8192,
    )  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(small), str(large)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    measured = [tuple(map(int, line.split())) for line in result.stdout.splitlines()]
    assert [model > least for (_, _, model), least in zip(measured, (80e6, 40e6), strict=True)] == [True, True]
    for anonymous, resident, model in measured:
        assert anonymous < model + 20e6, "a second copy of the weights was made"
        assert resident < model + 60e6, "more than one shard stayed mapped"
