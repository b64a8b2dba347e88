"""diffpo as a model of lm-evaluation-harness: ``pip install 'diffpo[lm-eval]'``, then

    python -m diffpo.lm_eval_adapter run --model diffpo --model_args model=FOLDER,gen_length=256,rule=fixed --tasks gsm8k --apply_chat_template

generate_until decodes ``gen_length`` tokens greedily, whatever a task's max_gen_toks says, with a commit rule as in
``python -m diffpo.evaluate``, and cuts at the first stop string. loglikelihood is exact for the order left to right, one token at a time:
sum_k log p(y_k | context, y_<k, the rest masked), n network evaluations for n tokens. That is the likelihood of one order of
unmasking and no bound over all orders: it differs from the Monte-Carlo bound that LLaDA's published scores rest on.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffpo.decoding.generation import check_lengths, decode_text, stream
from diffpo.decoding.stopping import check_stop
from diffpo.decoding_config import DecodingConfig
from diffpo.dependencies import require
from diffpo.device import choose_device
from diffpo.evaluate import protocol_rule
from diffpo.models.chat_template import render_chats
from diffpo.models.checkpoints import load
from diffpo.models.special_tokens import encode_text
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.tasks.task import BLOCK_LENGTH, GEN_LENGTH

require("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.api.registry import register_model  # noqa: E402


@register_model("diffpo")
class DiffpoLM(TemplateLM):
    """A masked diffusion LM for lm-eval. ``model`` and ``revision`` as in ``diffpo.load``, ``decoding`` the fields of
    ``DecodingConfig`` (gamma, cache, dtype, ...); ValueError names a field that does not fit."""

    def __init__(
        self,
        model: str,
        gen_length: int = GEN_LENGTH,
        block_length: int | None = None,
        rule: str = "auto",
        steps: int | None = None,
        batch_size: int | str | None = 8,
        max_batch_size: int | None = None,
        device: str | None = None,
        revision: str | None = None,
        **decoding: Any,
    ):
        super().__init__()
        self.gen_length, self.block_length = gen_length, block_length or min(BLOCK_LENGTH, gen_length)
        check_lengths(self.gen_length, self.block_length)
        if rule == "auto" and steps is not None:
            rule = "fixed"
        rows = 8 if batch_size in (None, "auto") else int(batch_size)
        self.config = DecodingConfig(rule=rule, steps=steps, batch_size=rows, **decoding)
        self.name = model
        self.model = load(model, choose_device(device or "auto"), self.config.dtype, revision)
        rule, steps = protocol_rule(self.config, self.model, gen_length)
        self.config = self.config.model_copy(update={"rule": rule, "steps": steps})
        if self.model.tokenizer is None:
            raise ValueError(f"model {model!r} has no tokenizer, which lm-eval needs")
        self.tokenizer = self.model.tokenizer

    @property
    def eot_token_id(self) -> int | None:
        return next(iter(self.model.eos_ids), None)

    @property
    def prefix_token_id(self) -> int | None:
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return render_chats(self.tokenizer, [chat_history])[0]  # continues a last message of the assistant

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return encode_text(
            self.tokenizer, string, add_special_tokens is not False
        )  # a BOS of a chat template stays alone

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        contexts, options = zip(*(request.args for request in requests), strict=True)
        for option in options:
            if option.get("do_sample") and option.get("temperature", 1.0) > 0:
                raise ValueError("the diffpo model of lm-eval decodes greedily: set do_sample=False or temperature=0")
        prompts = [torch.tensor(self.tok_encode(context)) for context in contexts]
        rule = self.config.commit_rule(self.model, self.gen_length)
        rows = stream(self.model, prompts, self.gen_length, self.block_length, rule, **self.config.stream_options())
        texts = [""] * len(requests)
        for index, generation in rows:
            stop = until_strings(options[index].get("until", ()))
            texts[index] = decode_text(self.model, generation.trajectory, check_stop(self.model, stop))[0]
            self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
        return texts

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scores = []
        for texts, context, continuation in requests:
            scores.append(left_to_right(self.model, context, continuation, self.config.batch_size))
            self.cache_hook.add_partial("loglikelihood", texts, scores[-1])
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError(
            "perplexity tasks are not supported: a masked diffusion LM has no likelihood of a long text at a bearable cost"
        )


def until_strings(until: str | Sequence[str]) -> list[str]:
    """The stop strings of a task; some name an empty one, which stops nothing."""
    return [string for string in ([until] if isinstance(until, str) else until) if string]


@torch.no_grad()
def left_to_right(
    model: MaskedDiffusionLM, context: Sequence[int], continuation: Sequence[int], batch_size: int
) -> tuple[float, bool]:
    """sum_k log p(y_k | context, y_<k, the rest masked) in nats, the mask token excluded, and whether every y_k is the argmax.

    One row per token of the continuation, ``batch_size`` rows together. ValueError if both are longer than the model's context.
    """
    answer_L = torch.tensor(continuation, dtype=torch.int64, device=model.device)
    position_L = torch.arange(len(answer_L), device=model.device)
    prompt_P = torch.tensor(context, dtype=torch.int64, device=model.device)
    total, greedy = 0.0, True
    for first in range(0, len(answer_L), batch_size):
        rows_N = position_L[first : first + batch_size]
        latent_NL = torch.where(position_L < rows_N[:, None], answer_L, model.mask_id)
        tokens_NT = torch.cat([prompt_P.expand(len(rows_N), -1), latent_NL], dim=1)
        logprob_NV = next_logprobs(model, tokens_NT, len(prompt_P) + rows_N)
        chosen_N = answer_L[rows_N]
        total += logprob_NV.gather(1, chosen_N[:, None]).double().sum().item()
        greedy &= bool((logprob_NV.argmax(dim=1) == chosen_N).all())
    if math.isnan(total):
        raise FloatingPointError("the model's logits are NaN or infinite")
    return total, greedy


def next_logprobs(model: MaskedDiffusionLM, tokens_NT: Tensor, position_N: Tensor) -> Tensor:
    """Log-probs fp32 [N, V] at one position of each row, without the mask token."""
    row_N = torch.arange(len(tokens_NT), device=tokens_NT.device)
    logits_NV = model(tokens_NT, read=lambda hidden_NTD: model.head(hidden_NTD[row_N, position_N])).float()
    logits_NV[:, model.mask_id] = -math.inf
    return logits_NV.log_softmax(dim=-1)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    from diffpo.runs.faults import output_may_fail

    with output_may_fail():
        cli_evaluate()
