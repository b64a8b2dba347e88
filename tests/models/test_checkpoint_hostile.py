"""Folders made to hang, kill or fill the process: each one is a ValueError, in seconds and in little memory."""

import json
import os
import resource
import socket
import subprocess
import sys
import textwrap
import time

import pytest
from safetensors.torch import load_file, save_file

import diffpo

DEEP = "[" * 100_000 + "]" * 100_000
INDEX = "model.safetensors.index.json"
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def config(**changes):
    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def text_file(name, text):
    return lambda folder: (folder / name).write_text(text)


def binary_file(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def sparse_file(name, size, start=b""):
    def damage(folder):
        with open(folder / name, "wb") as file:
            file.write(start)
            file.truncate(size)

    return damage


def replaced(name, make):
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def a_link(name, target):
    return replaced(name, lambda path: path.symlink_to(target))


def a_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets have 108 bytes
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def header(entries, data=b"", length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return binary_file(
        "model.safetensors", (len(text) if length is None else length).to_bytes(8, "little") + text + data
    )


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def index(weight_map):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        (folder / INDEX).write_text(
            weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
        )

    return damage


def tokenizer(change):
    def damage(folder):
        settings = json.loads((folder / "tokenizer.json").read_text())
        change(settings)
        (folder / "tokenizer.json").write_text(json.dumps(settings))

    return damage


def settings(**changes):
    def damage(folder):
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def nested(kind, inner, depth):
    return f'{{"type": "Sequence", "{inner}": [' * depth + kind + "]}" * depth


def nested_normalizer(folder):
    text = (folder / "tokenizer.json").read_text()
    assert '"normalizer": null' in text
    chain = nested('{"type": "NFC"}', "normalizers", 20_000)
    (folder / "tokenizer.json").write_text(text.replace('"normalizer": null', f'"normalizer": {chain}'))


def expression(pattern):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return tokenizer(lambda t: t.update(pre_tokenizer=split))


def growing(t):
    replacement = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    t["normalizer"] = {"type": "Sequence", "normalizers": [replacement] * 12}


def padded(t):
    t["padding"] = {
        "strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "x",
    }  # fmt: skip


def absent_token(t):
    single = [{"SpecialToken": {"id": "nowhere", "type_id": 0}}]
    t["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}


SIZES = (
    "d_model",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "mlp_hidden_size",
    "embedding_size",
    "vocab_size",
    "max_sequence_length",
)
WRONG = {"2^62": 2**62, "2^62-1": 2**62 - 1, "10^5": 10**5, "10^12": 10**12, "negative": -4, "zero": 0, "float": 4.0, "bool": True,
         "text": "4", "list": [4], "object": {}, "NaN": float("nan"), "infinite": float("inf"), "digits": 10**4000}  # fmt: skip
# a longer sequence, and fewer layers of keys, are no lies about the weights
FINE = {("max_sequence_length", "10^5")}

CASES = {
    f"{key} {name}": config(**{key: value}) for key in SIZES for name, value in WRONG.items() if (key, name) not in FINE
}
CASES |= {
    "ids that are true": config(mask_token_id=True),
    "ids beyond the vocabulary": config(eos_token_id=2**40),
    "rms_norm_eps NaN": config(rms_norm_eps=float("nan")),
    "rms_norm_eps text": config(rms_norm_eps="1e-5"),
    "rope_theta infinite": config(rope_theta=float("inf")),
    "rope_theta of 4000 digits": config(rope_theta=10**3999),
    "rope_theta true": config(rope_theta=True),
    "weight_tying 1": config(weight_tying=1),
    "include_qkv_bias text": config(include_qkv_bias="false"),
    "mlp_ratio repeats a text": config(mlp_hidden_size=None, mlp_ratio="x", d_model=2**40),
    "mlp_ratio 2^62": config(mlp_hidden_size=None, mlp_ratio=2**62),
    "architectures nested": config(architectures=[[["x"]]] * 1000, model_type="other"),
    "model_type is an object": config(model_type={"a": 1}),
    "model_type of a megabyte": config(model_type="x" * 10**6),
    "an unknown key of a megabyte": config(**{"k" * 10**6: "v" * 10**6}),
    "config deep": text_file("config.json", '{"a":' + DEEP + "}"),
    "config deep within Python's limit": text_file("config.json", '{"a":' + "[" * 500 + "]" * 500 + "}"),
    "config with a key twice": text_file("config.json", '{"model_type": "llada", "model_type": "Dream"}'),
    "config of 1 GB": sparse_file("config.json", 2**30, b"{"),
    "config is UTF-16": binary_file("config.json", '{"model_type": "llada"}'.encode("utf-16")),
    "config holds an integer of a million digits": text_file("config.json", '{"a": ' + "1" * 10**6 + "}"),
    "config is a pipe": replaced("config.json", os.mkfifo),
    "config is a folder": replaced("config.json", os.mkdir),
    "config is a device": a_link("config.json", "/dev/zero"),
    "config is a loop of links": a_link("config.json", "config.json"),
    "generation config deep": text_file("generation_config.json", '{"a":' + DEEP + "}"),
    "generation config is a pipe": replaced("generation_config.json", os.mkfifo),
    "weights are a pipe": replaced("model.safetensors", os.mkfifo),
    "weights are a socket": replaced("model.safetensors", a_socket),
    "weights are a folder": replaced("model.safetensors", os.mkdir),
    "weights are zeros without end": a_link("model.safetensors", "/dev/zero"),
    "weights are chance": a_link("model.safetensors", "/dev/random"),
    "weights lie elsewhere": a_link("model.safetensors", __file__),
    "weights are empty": binary_file("model.safetensors", b""),
    "weights are a git-lfs pointer": text_file("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "header of 10 GB": header(b"{}", length=10 * 2**30),
    "header of 10 GB that is there": sparse_file("model.safetensors", 11 * 2**30, (10 * 2**30).to_bytes(8, "little") + b"{"),
    "header of 50 MB": sparse_file("model.safetensors", 2**26, (50 * 2**20).to_bytes(8, "little") + b"{"),
    "header of 2^64 - 1": header(b"{}", length=2**64 - 1),
    "header deep": header(b'{"a":' + DEEP.encode() + b"}"),
    "header is a list": header(b"[]"),
    "header without tensors": header({}),
    "offsets out of range": header({"a": entry([4], 0, 16)}, b"123"),
    "offsets overlap": header({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"1234"),
    "offsets backwards": header({"a": entry([1], 4, 0)}, b"1234"),
    "shape overflows": header({"a": entry([2**62, 2**62], 0, 4)}, b"1234"),
    "shape negative": header({"a": entry([-1], 0, 4)}, b"1234"),
    "dtype of another kind": header({"a": entry([4], 0, 4, "F8_E4M3")}, b"1234"),
    "dtype unknown": header({"a": entry([1], 0, 4, "F31")}, b"1234"),
    "a tensor's name of a megabyte": header({"a" * 10**6: entry([1], 0, 4)}, b"1234"),
    "a tensor's name with NUL": header({"a\0b": entry([1], 0, 4)}, b"1234"),
    "index leaves the folder": index({"a": "../model.safetensors"}),
    "index is absolute": index({"a": "/etc/model.safetensors"}),
    "index names a long file": index({"a": "x" * 300 + ".safetensors"}),
    "index names NUL": index({"a": "x\0.safetensors"}),
    "index names half a character": index('{"weight_map": {"a": "\\ud800.safetensors"}}'),
    "index names numbers": index({"a": 7}),
    "index deep": index('{"weight_map":' + DEEP + "}"),
    "index with a tensor twice": index('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
    "a shard is a pipe": lambda folder: (index({"a": "x.safetensors"})(folder), os.mkfifo(folder / "x.safetensors")),
    "a shard is a device": lambda folder: (index({"a": "x.safetensors"})(folder), (folder / "x.safetensors").symlink_to("/dev/zero")),
    "tokenizer deep": text_file("tokenizer.json", '{"model":' + DEEP + "}"),
    "tokenizer of 1 GB": sparse_file("tokenizer.json", 2**30, b"{"),
    "tokenizer is a pipe": replaced("tokenizer.json", os.mkfifo),
    "tokenizer lies elsewhere": a_link("tokenizer.json", "/etc/passwd"),
    "tokenizer is a git-lfs pointer": text_file("tokenizer.json", "version https://git-lfs.github.com/spec/v1\nsize 1\n"),
    "tokenizer config deep": text_file("tokenizer_config.json", '{"a":' + DEEP + "}"),
    "template of 100 MB": sparse_file("chat_template.jinja", 100 * 2**20, b"{{ 'x' }}"),
    "template is a pipe": replaced("chat_template.jinja", os.mkfifo),
    "template in the config of 100 MB": lambda folder: settings(chat_template="x" * 10**8)(folder),
    "special tokens are a device": a_link("special_tokens_map.json", "/dev/zero"),
    "added tokens deep": text_file("added_tokens.json", '{"a":' + DEEP + "}"),
    "normalizers nested": nested_normalizer,
    "expression that backtracks": expression("(a+)+$"),
    "expression that backtracks over spaces": expression(r"(\s+)*x$"),
    "expression of a million groups": expression("(" * 10**6 + ")" * 10**6),
    "text that grows": tokenizer(growing),
    "padding to 10^12": tokenizer(padded),
    "processor with an absent token": tokenizer(absent_token),
    "charsmap that is none": tokenizer(lambda t: t.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
    "stride beyond the length": tokenizer(
        lambda t: t.update(truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 10})
    ),
    "merges of nonsense": tokenizer(lambda t: t["model"].update(merges=[["q", "nowhere"]])),
    "merges longer than their parts": tokenizer(lambda t: t["model"].update(vocab={"a": 0, "b": 1}, merges=[["a", "b"]])),
    "vocabulary ids near 2^62": tokenizer(lambda t: t["model"]["vocab"].update(zz=2**62)),
    "vocabulary ids near 2^32": tokenizer(lambda t: t["model"]["vocab"].update(zz=2**32 - 2)),
    "added token ids near 2^32": tokenizer(lambda t: t["added_tokens"].append(ADDED | {"id": 2**32 - 1, "content": "<zz>"})),
    "model null": tokenizer(lambda t: t.update(model=None)),
    "tokenizer of another kind": text_file("tokenizer.json", "[]"),
    "an added id near 2^62": settings(added_tokens_decoder={str(2**62): ADDED | {"content": "<one>"}}),
    "an added id near 2^62 in a file": text_file("added_tokens.json", json.dumps({"<one>": 2**62})),
    "an added token that is a number": settings(added_tokens_decoder={"1": 7}),
    "an added id that is a word": settings(added_tokens_decoder={"one": ADDED | {"content": "<one>"}}),
    "threshold is a pipe": replaced("diffpo_threshold.st", os.mkfifo),
    "threshold is empty": binary_file("diffpo_threshold.st", b""),
    "threshold lies elsewhere": a_link("diffpo_threshold.st", "/etc/passwd"),
    "code lies elsewhere": a_link("stolen.py", "/etc/passwd"),
}  # fmt: skip


def spent() -> float:
    """Seconds of processor time, of this process and of those it waited for: other work on the machine does not count."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


@pytest.fixture(scope="module")
def warm():
    """What is imported at the first load is imported."""
    diffpo.load("tiny-countdown")


@pytest.mark.parametrize("case", list(CASES))
def test_a_hostile_folder_is_a_value_error_within_seconds(published, warm, case):
    folder, _, _ = published("llada", "hostile")
    CASES[case](folder)
    start = spent()
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        diffpo.load(folder)
    assert spent() - start < 2
    assert len(str(caught.value)) < 2000
    assert "hostile" in str(caught.value), "the message does not name the folder"


OWN = {f"{key} {name}": {key: value} for key in ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")
       for name, value in WRONG.items()}  # fmt: skip
OWN |= {
    "threshold_gammas text": {"threshold_gammas": "0.1"},
    "threshold_gammas nested": {"threshold_gammas": [[0.1]]},
    "threshold_gammas true": {"threshold_gammas": [True]},
    "threshold_gammas NaN": {"threshold_gammas": [float("nan")]},
    "threshold_gammas without weights": {"threshold_gammas": [0.1] * 10**5},
    "logit_shift 0": {"logit_shift": 0},
}


def test_a_hostile_own_folder_is_a_value_error_within_seconds(random_model, warm, tmp_path):
    random_model().save(tmp_path)
    before = (tmp_path / "config.json").read_text()
    for case, changes in OWN.items():
        (tmp_path / "config.json").write_text(before)
        config(**changes)(tmp_path)
        start = spent()
        with pytest.raises(ValueError):  # noqa: PT011
            diffpo.load(tmp_path)
        assert spent() - start < 2, case


TABLES = {
    "vocabulary deep": text_file("vocab.json", '{"a":' + DEEP + "}"),
    "vocabulary of 1 GB": sparse_file("vocab.json", 2**30, b"{"),
    "vocabulary is a pipe": replaced("vocab.json", os.mkfifo),
    "vocabulary id 2^62": text_file("vocab.json", json.dumps({"a": 2**62})),
    "vocabulary id near 2^32": text_file("vocab.json", json.dumps({"a": 2**32 - 1})),
    "merges of nonsense": text_file("merges.txt", "#version: 0.2\nq nowhere\n"),
    "merges of bytes": binary_file("merges.txt", b"\xff\xfe\x00"),
    "merges lie elsewhere": a_link("merges.txt", "/etc/passwd"),
    "added token beyond the vocabulary": text_file("added_tokens.json", json.dumps({"<zz>": 10**9})),
}


@pytest.mark.parametrize("case", list(TABLES))
def test_hostile_tables_of_a_tokenizer(published, warm, case):
    folder, _, _ = published("Dream", "hostile")
    TABLES[case](folder)
    start = spent()
    with pytest.raises(ValueError, match="hostile"):
        diffpo.load(folder)
    assert spent() - start < 2


def test_a_threshold_file_is_checked_before_memory_is_allocated(published, monkeypatch):
    folder, _, _ = published("llada")
    model = diffpo.load(folder)
    model.add_threshold((0.1, 0.5))
    model.save(folder)
    path = folder / "diffpo_threshold.st"
    good = load_file(path)
    monkeypatch.setattr("diffpo.models.checkpoints._allocate", lambda *a: pytest.fail("memory was allocated"))
    for gammas in (DEEP, '"x"', "[true, 1]", '[1, 2], "b": 3', "[0.1]"):
        save_file(good, path, metadata={"gammas": gammas, "proxy": "entropy"})
        with pytest.raises(ValueError, match=r"diffpo_threshold\.st"):
            diffpo.load(folder)


MEASURE = """
    import pathlib, sys
    import diffpo

    def most():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))

    folders = [pathlib.Path(name) for name in sys.argv[1:]]
    diffpo.load(folders[0])  # imports and caches
    before = most()
    for folder in folders[1:]:
        try:
            diffpo.load(folder)
        except (ValueError, FileNotFoundError):
            grown, before = most() - before, most()
            print(folder.name, round(grown))
"""
HEAVY = [
    "config of 1 GB", "config deep", "weights are zeros without end", "header of 10 GB that is there", "header of 50 MB", "n_layers 10^5",
    "embedding_size 10^12", "tokenizer of 1 GB", "template of 100 MB", "text that grows", "padding to 10^12", "normalizers nested",
    "expression of a million groups", "template in the config of 100 MB",
]  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hostile_folders_take_little_memory(published):
    folders = [published("llada", "harmless")[0]]
    for case in HEAVY:
        folders.append(published("llada", case.replace(" ", "-"))[0])
        CASES[case](folders[-1])
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), *map(str, folders)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = {name: int(megabytes) for name, megabytes in map(str.split, result.stdout.splitlines())}
    assert len(measured) == len(HEAVY)
    assert max(measured.values()) < 200, measured
