"""The process in which math-verify runs: a pair of LaTeX answers per line in, a verdict per line out.

Run as a script, so that it imports neither torch nor diffpo. math-verify's own time limits rest on SIGALRM, which neither works outside a
main thread nor interrupts arithmetic on huge integers: they are off, and the parent kills a process that takes too long.
"""

import json
import logging
import os
import resource
import sys


def equal(gold: str, answer: str) -> bool:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    parsed = [parse(f"\\boxed{{{side}}}", config, parsing_timeout=None, raise_on_error=True) for side in (gold, answer)]
    if not parsed[0]:
        raise ValueError(f"math-verify cannot read the reference answer {gold!r}")
    return verify(*parsed, timeout_seconds=None, raise_on_error=True)


def main(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no reply
    equal("1", "1")  # imports sympy and builds the grammar, before the clock of the first pair starts
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        try:
            reply = equal(*json.loads(line))
        except Exception as error:
            reply = f"{type(error).__name__}: {error}"[:200]
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
