"""Loads a tokenizer, run as a process of its own: ``python tokenizer_trial.py FOLDER MEGABYTES SECONDS``.

A tokenizer.json is a program for a native library: it can end the process, or take all of its time and memory. Here it does so
where nothing is lost. Imports nothing of diffpo, because that takes seconds. Prints "ok", or what is wrong with the files; any
other end of this process means a tokenizer that must not be loaded.
"""

import json
import os
import string
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def main(folder: str, megabytes: str, seconds: str) -> None:
    from tokenizers import Tokenizer, models

    limit(int(megabytes) * 2**20, int(seconds))
    whole = os.path.join(folder, "tokenizer.json")
    try:
        if os.path.exists(whole):
            tokenizer = Tokenizer.from_file(whole)
            refuse_other_ids(tokenizer, whole)
        else:
            parts = (os.path.join(folder, name) for name in ("vocab.json", "merges.txt"))
            tokenizer = Tokenizer(models.BPE.from_file(*parts))
    except Exception as error:
        print(str(error)[:500])
        return
    for text in probes():
        try:
            tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False)
        except Exception:
            continue  # a word that the vocabulary lacks
    print("ok")


def refuse_other_ids(tokenizer: "Tokenizer", path: str) -> None:
    """The library gives a token that was added another id than the file says, when the ids before it are not in use."""
    with open(path, encoding="utf-8") as file:
        added = json.load(file).get("added_tokens") or []
    for token in added:
        found = tokenizer.token_to_id(token["content"])
        if found != token["id"]:
            raise ValueError(f"added token {token['content'][:50]!r} has the id {token['id']}, but would get {found}")


def limit(memory: int, seconds: int) -> None:
    """At most ``memory`` bytes beyond what is mapped now, and ``seconds`` of processor time, where the system knows limits."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))


def probes() -> Iterator[str]:
    """Texts that make an expression with nested repetitions try every way to match: one for every character, with an end that holds
    whatever the expression may look for next."""
    yield "The 2 quick foxes' caf\u00e9, \u4f60\u597d \U0001f642.\n\n  x = [1, 2];\t"
    for character in string.printable:
        yield character * 40 + string.printable


if __name__ == "__main__":
    main(*sys.argv[1:])
