"""What an update in parts holds at its peak: one part, the gradient, and a few numbers for each token of the batch."""

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from diffpo.likelihood.score import score
from diffpo.objectives import OBJECTIVES, Batch
from diffpo.training.update import accumulate_gradient
from diffpo.trajectory import Action, Trajectory

LENGTH, GROUP, AT_ONCE = 24, 4, 4  # tokens, rollouts, sequences
PER_TOKEN = 250  # bytes for each token of the batch; scores held as arrays [P, L] took four times as many
CASES = [  # and how many rollouts fill more than one part
    ("diffpo", {"m": 0}, 4),
    ("diffpo", {"m": 2}, 32),
    ("d1", {}, 32),
    ("tracerl", {"merged_steps": 1}, 4),
    ("espo", {"pairs": 1}, 8),
]


def batch_of(rollouts: int, vocabulary: int) -> Batch:
    """Rollouts that nobody decoded, one token a step in a random order."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, vocabulary, (rollouts, LENGTH), generator=generator)
    order, zeros, rows = (
        torch.rand(rollouts, LENGTH, generator=generator).argsort(dim=1),
        torch.zeros(rollouts, LENGTH),
        torch.arange(rollouts),
    )
    prompts = tokens[rows // GROUP, :4]
    advantage = torch.linspace(-1, 1, rollouts)
    trajectory = Trajectory(
        prompt_ids=prompts, prompt_mask=torch.ones_like(prompts, dtype=torch.bool), tokens=tokens, commit_step=order + 1,
        logprob=zeros - 3, entropy=zeros, gamma=torch.ones(rollouts), nfe=torch.full((rollouts,), LENGTH),
        length=torch.full((rollouts,), LENGTH), key=rows, group=rows // GROUP, version=torch.zeros_like(rows), mask_id=2,
        temperature=1.0, block_length=LENGTH, actions={"gamma": Action(rows % 2, zeros[:, 0])},
    )  # fmt: skip
    return Batch(trajectory, advantage, advantage)


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes of tensors that were alive at once, of those that the call made."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(sizes.cumsum(0).max())


def test_the_peak_is_that_of_what_lives_at_once():
    def call():
        kept = torch.zeros(1000)
        for _ in range(5):
            kept = kept + torch.ones(1000)  # two more while it is added

    assert peak_bytes(call) == pytest.approx(3 * 4000, abs=500)


@pytest.mark.parametrize(("name", "changes", "fewest"), CASES, ids=str)
def test_a_larger_batch_adds_only_its_own_numbers(random_model, name, changes, fewest):
    model = random_model(3, vocab_size=31, threshold_gammas=(0.5, 1.5))
    objective = OBJECTIVES[name](OBJECTIVES[name].Config(kl_coefficient=0.1, **changes))
    tokens_at_once = AT_ONCE * (LENGTH + 4)
    peaks = []
    for rollouts in (fewest, 2 * fewest):
        batch = batch_of(rollouts, 31)
        latents = objective.latents(batch, 0)
        with torch.no_grad():
            reference = score(model, batch.trajectory, latents, tokens_at_once)
        arguments = (model, objective, batch, latents, batch.advantage, None, reference, tokens_at_once)
        model.zero_grad()
        peaks.append(peak_bytes(lambda: accumulate_gradient(*arguments)))  # noqa: B023
    assert peaks[1] - peaks[0] <= PER_TOKEN * fewest * LENGTH
