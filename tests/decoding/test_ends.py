"""A completion ends at the first of its model's ends, whichever it is."""

import torch

import diffpo


def test_a_completion_ends_at_the_first_of_its_ends(random_model):
    """Whichever it is: the same row as with one end more, cut there; holes are filled with the first."""
    prompts = [torch.tensor([3 + i % 10, 4 + i // 10]) for i in range(40)]
    options = {"gen_length": 16, "block_length": 4, "rule": diffpo.EntropyBounded(1.0), "temperature": 1.0}
    endless = diffpo.generate(random_model(3, vocab_size=13, eos_token_id=None), prompts, **options)
    out = diffpo.generate(random_model(3, vocab_size=13, eos_token_id=(5, 9)), prompts, **options)
    early = 0
    for row in range(len(prompts)):
        tokens, whole = out.tokens[row].tolist(), endless.tokens[row].tolist()
        ends = [place for place, token in enumerate(whole) if token in (5, 9)]
        length = out.trajectory.length[row].item()
        assert length == (ends[0] + 1 if ends else 16)
        assert tokens[:length] == whole[:length]
        holes = out.trajectory.commit_step[row] == 0
        assert (out.tokens[row][holes] == 5).all()
        early += int(out.nfe[row] < endless.nfe[row])
    ended_by = {out.tokens[row, out.trajectory.length[row] - 1].item() for row in range(len(prompts))}
    assert {5, 9} <= ended_by
    assert early > 5


def test_static_steps_end_where_the_others_do(random_model, decode_with, assert_same):
    model = random_model(3, vocab_size=13, eos_token_id=(5, 9))
    prompts = [torch.tensor([3 + i, 4]) for i in range(10)]
    options = {"gen_length": 16, "block_length": 4, "rule": diffpo.EntropyBounded(1.0), "temperature": 1.0}
    whole = diffpo.generate(model, prompts, **options).trajectory
    assert (whole.length < 16).any()
    assert_same(decode_with(static=True)(model, prompts, **options, batch_size=3), whole)
