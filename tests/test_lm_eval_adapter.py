"""diffpo as a model of lm-evaluation-harness."""

import json
import math

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra diffpo[lm-eval]")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from tokenizers.processors import TemplateProcessing

import diffpo
from diffpo.lm_eval_adapter import DiffpoLM, left_to_right, until_strings
from diffpo.tasks import Countdown
from diffpo.trajectory import Trajectory


@pytest.fixture(scope="module")
def lm() -> DiffpoLM:
    return DiffpoLM(model="tiny-countdown", gen_length=12, steps=12, batch_size=3, device="cpu")


def requests_of(kind: str, *arguments) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=index, metadata=(None, None, None))
        for index, pair in enumerate(arguments)
    ]


def test_it_is_registered_and_made_from_an_argument_string():
    kind = get_model("diffpo")
    lm = kind.create_from_arg_string(
        "model=tiny-countdown,gen_length=12,rule=eb,gamma=0.5", {"batch_size": "4", "device": "cpu"}
    )
    assert (lm.config.rule, lm.config.gamma, lm.config.batch_size, lm.block_length) == (
        "eb",
        0.5,
        4,
        12,
    )
    with pytest.raises(ValueError, match="rul"):
        kind.create_from_arg_string("model=tiny-countdown,rul=fixed", {})


@pytest.mark.parametrize(
    ("model", "steps", "rule"),
    [
        ("tiny-countdown", None, ("fixed", 6)),
        ("tiny-countdown-diffpo", None, ("learned", None)),
        ("tiny-countdown-diffpo", 4, ("fixed", 4)),
    ],
)
def test_a_learned_threshold_is_used_where_there_is_one(model, steps, rule):
    lm = DiffpoLM(model=model, gen_length=12, steps=steps, device="cpu")
    assert (lm.config.rule, lm.config.steps) == rule


def test_every_argument_has_an_effect_or_is_refused():
    lm = DiffpoLM(model="tiny-countdown", gen_length=12, dtype="bfloat16", device="cpu")
    assert lm.model.embed_tokens.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="revision 'main'"):
        DiffpoLM(model="tiny-countdown", revision="main", device="cpu")
    for without_effect in ({"task": "sudoku"}, {"limit": 3}, {"format": "compact"}):
        with pytest.raises(ValueError, match=next(iter(without_effect))):
            DiffpoLM(model="tiny-countdown", device="cpu", **without_effect)
    with pytest.raises(ValueError, match="multiple of block_length"):
        DiffpoLM(model="tiny-countdown", gen_length=12, block_length=5)


def test_generation_is_that_of_diffpo_cut_at_the_stop_strings(lm):
    task = Countdown()
    prompts = [task.prompt(p) for p in task.problems("test", 5, seed=0)]
    whole = diffpo.generate(lm.model, prompts, 12, rule=diffpo.FixedSchedule(12)).text
    texts = lm.generate_until(requests_of("generate_until", *((prompt, {"until": [","]}) for prompt in prompts)))
    assert texts == [text.split(",")[0] for text in whole]
    assert lm.generate_until(requests_of("generate_until", (prompts[0], {"until": []}))) == whole[:1]


def test_special_tokens_stop_and_a_bos_stands_once():
    lm = DiffpoLM(model="tiny-countdown", gen_length=12, steps=12, batch_size=3, device="cpu")
    prompt = Countdown().prompt(Countdown().problems("test", 1, seed=0)[0])
    whole = diffpo.generate(lm.model, [prompt], 12, rule=diffpo.FixedSchedule(12)).text[0]
    lm.tokenizer.add_tokens([","], special_tokens=True)
    assert lm.generate_until(requests_of("generate_until", (prompt, {"until": [",", ""]}))) == [whole.split(" ,")[0]]
    lm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    assert lm.tok_encode("<pad> 1 2") == lm.tok_encode("1 2") == [0, *lm.tok_encode("1 2", add_special_tokens=False)]
    assert lm.tok_encode("<pad> 1 2", add_special_tokens=True) == lm.tok_encode("1 2")


def test_sampling_is_refused(lm):
    with pytest.raises(ValueError, match="greedily"):
        lm.generate_until(requests_of("generate_until", ("1 2 3 -> 6", {"do_sample": True, "temperature": 0.7})))


@pytest.mark.parametrize(
    ("until", "expected"), [(["b"], ["b"]), (["c", "b"], ["c", "b"]), ("b", ["b"]), ([""], []), (["", "x"], ["x"])]
)
def test_until_strings(until, expected):
    assert until_strings(until) == expected


def test_the_likelihood_is_that_of_the_order_left_to_right(random_model, random_prompts):
    model = random_model()
    (prompt, answer) = random_prompts(model, [6, 5])
    n = len(answer)
    none = torch.full((1,), math.nan)
    zero = torch.zeros(1, dtype=torch.int64)
    trajectory = Trajectory(
        prompt[None], torch.ones(1, 6, dtype=torch.bool), answer[None], torch.arange(1, n + 1)[None], torch.zeros(1, n),
        torch.zeros(1, n), none, torch.tensor([n]), torch.tensor([n]), zero, zero, zero, model.mask_id, 0.0, n,
    )  # fmt: skip
    exact = diffpo.trajectory_logprobs(model, trajectory, boundaries=range(n)).sum().item()
    for batch_size in (1, 2, 8):
        total, greedy = left_to_right(model, prompt.tolist(), answer.tolist(), batch_size)
        assert total == pytest.approx(exact, abs=1e-4)
        assert not greedy


def test_the_greedy_continuation_is_greedy_and_likelihoods_sum_to_one(random_model, random_prompts):
    model = random_model(vocab_size=8)
    (prompt,) = random_prompts(model, [4])
    pairs = [(a, b) for a in range(8) for b in range(8) if model.mask_id not in (a, b)]
    scores = {pair: left_to_right(model, prompt.tolist(), pair, 4) for pair in pairs}
    assert sum(math.exp(total) for total, _ in scores.values()) == pytest.approx(1.0, abs=1e-5)
    assert sum(greedy for _, greedy in scores.values()) == 1
    assert left_to_right(model, prompt.tolist(), [], 4) == (0.0, True)


def test_perplexity_is_not_offered(lm):
    with pytest.raises(NotImplementedError, match="perplexity"):
        lm.loglikelihood_rolling([])


@pytest.mark.slow
def test_whole_tasks(lm, tmp_path, monkeypatch):
    """A task that generates and one that ranks choices, through lm-eval's own evaluator."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    task = Countdown()
    problems = task.problems("test", 4, seed=0)
    whole = diffpo.generate(lm.model, [task.prompt(p) for p in problems], 12, rule=diffpo.FixedSchedule(12)).text
    targets = [*whole[:3], "0 + 0 = 0"]
    rows = [{"prompt": task.prompt(p), "target": t} for p, t in zip(problems, targets, strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path)},
        "test_split": "test", "doc_to_text": "{{prompt}}", "target_delimiter": " ",
    }  # fmt: skip
    generating = common | {
        "task": "generating", "output_type": "generate_until", "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False}, "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    ranking = common | {
        "task": "ranking", "output_type": "multiple_choice", "doc_to_choice": ["1 + 1 = 2", "+ + + + +"], "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    none_else = TaskManager(include_defaults=False)  # reading those that lm-eval brings takes seconds
    evaluated = simple_evaluate(model=lm, tasks=[generating, ranking], bootstrap_iters=0, task_manager=none_else)
    results = evaluated["results"]
    assert results["generating"]["exact_match,none"] == 0.75
    assert results["ranking"]["acc,none"] == 1.0
