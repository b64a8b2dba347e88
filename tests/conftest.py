"""Shared by all tests: no network, one thread, the CPU, small random models, a counter of network evaluations,
poisoned memory.

diffpo is imported where it is needed: the tests of the kernels run without its dependencies.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from diffpo import MaskedDiffusionLM

torch.set_num_threads(1)


try:
    import hypothesis  # noqa: F401
except ImportError:
    spec = importlib.util.spec_from_file_location("hypothesis", Path(__file__).with_name("hypothesis_stand_in.py"))
    sys.modules["hypothesis"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["hypothesis"])


@pytest.fixture(autouse=True, scope="session")
def auto_is_the_cpu():
    """What is loaded is compared with what was made on the CPU, on a machine with a GPU too; not so in tests/gpu."""
    with pytest.MonkeyPatch.context() as patch:
        with suppress(ImportError):  # the tests of the kernels need no diffpo
            patch.setattr("diffpo.device.default_device", lambda: "cpu")
        yield


def build_random_model(seed: int = 0, scale: float = 1.0, **changes) -> MaskedDiffusionLM:
    """Two layers, 32 wide, ids 0 pad, 1 EOS, 2 mask; every parameter random, logits with a standard deviation of about 2 * scale."""
    from diffpo import MaskedDiffusionLM, ModelConfig

    fields = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "mask_token_id": 2,
    }
    model = MaskedDiffusionLM(ModelConfig(**fields | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.1 * noise)
            elif name.startswith(("lm_head", "embed_tokens")):
                parameter.copy_(0.4 * scale * noise)
            elif name.startswith("threshold") or parameter.dim() == 1:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)
    return model.eval()


def loop_over_tokens(model: MaskedDiffusionLM, trajectory, boundaries_per_row) -> torch.Tensor:
    """[B, L] log pi(o_k | c, z_tau), tau the latest boundary before the commit step of k; a list of boundaries for each row.

    One unpadded network evaluation for each token. Differentiable.
    """
    B, L = trajectory.tokens.shape
    result = [[torch.zeros(())] * L for _ in range(B)]
    for b in range(B):
        prompt = trajectory.prompt_ids[b][trajectory.prompt_mask[b]]
        for k in range(L):
            step = int(trajectory.commit_step[b, k])
            if step == 0:
                continue
            tau = max(t for t in boundaries_per_row[b] if t < step)
            latent = [
                int(trajectory.tokens[b, j]) if 0 < trajectory.commit_step[b, j] <= tau else trajectory.mask_id
                for j in range(L)
            ]
            logits = model.logits(torch.cat([prompt, torch.tensor(latent)])[None])[0, len(prompt) + k]
            keep = torch.arange(len(logits)) != trajectory.mask_id
            log_normaliser = (logits[keep] / (trajectory.temperature or 1.0)).logsumexp(dim=0)
            result[b][k] = logits[int(trajectory.tokens[b, k])] / (trajectory.temperature or 1.0) - log_normaliser
    return torch.stack([torch.stack(row) for row in result])


@pytest.fixture
def naive_logprobs():
    """naive_logprobs(model, trajectory, one list of boundaries per row) -> [B, L]."""
    return loop_over_tokens


@pytest.fixture
def random_model():
    """random_model(seed, scale, **config changes) -> MaskedDiffusionLM."""
    return build_random_model


@pytest.fixture
def random_prompts():
    """random_prompts(model, lengths, seed) -> one 1-d id tensor per length, ids 3 and up."""

    def draw(model: MaskedDiffusionLM, lengths, seed: int = 0) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(3, model.config.vocab_size, (length,), generator=generator) for length in lengths]

    return draw


@pytest.fixture
def forward_rows():
    """``with forward_rows(model) as rows:`` collects the number of rows of every network evaluation."""

    @contextmanager
    def watch(model: MaskedDiffusionLM):
        rows: list[int] = []
        handle = model.register_forward_hook(lambda module, arguments, output: rows.append(len(arguments[0])))
        try:
            yield rows
        finally:
            handle.remove()

    return watch


@pytest.fixture
def full_disk():
    """``with full_disk(n):`` no file becomes longer than n bytes: the system refuses the write, whoever writes, as it does on a full disk."""

    @contextmanager
    def limited(size: int):
        before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))

    return limited


@pytest.fixture(scope="session")
def browser():
    """Chromium, headless; a test without it, or without playwright, is skipped."""
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip("no Chromium is installed")
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_file(browser):
    """open_file(path, **context): a page in a fresh tab; fails on any error, console message or request but the page itself."""
    problems, contexts = [], []

    def open_(path, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.on("request", lambda request: problems.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaN (largest integer, True), so that an output that a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def chi_square():
    """chi_square(counts, probabilities) -> the probability of counts at least this far from the expected ones."""

    def p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
        counts, probabilities = counts.double(), probabilities.double()
        assert counts.shape == probabilities.shape
        assert counts[probabilities == 0].sum() == 0, "an impossible outcome was seen"
        expected = probabilities / probabilities.sum() * counts.sum()
        rare = expected < 5  # pooled: the approximation needs a few expected counts per cell
        observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        observed, expected = observed[expected > 0], expected[expected > 0]
        statistic = ((observed - expected) ** 2 / expected).sum()
        assert len(observed) > 1
        return torch.special.gammaincc(torch.tensor((len(observed) - 1) / 2).double(), statistic / 2).item()

    return p_value


@pytest.fixture
def toml(tmp_path):
    """toml(text) -> path of a config file."""

    def write(text: str) -> str:
        path = tmp_path / "x.toml"
        path.write_text(text)
        return str(path)

    return write
