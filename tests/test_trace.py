"""The page of ``--trace``: what it holds, that no text in it is markup, and how it behaves in a browser.

The browser tests need Chromium and playwright (``pip install -e '.[browser]'``) and are skipped without them.
"""

import json
import re

import pytest
from html_pages import Page, assert_self_contained
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diffpo.html_page import json_for_html
from diffpo.trace import token_pieces, trace_page

HOSTILE = (
    '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2"><!-- &lt; \u2028 {{ 7 * 7 }}'
)
FACTS = {"model": "m", "rule": "r", "temperature": "0"}


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes as tokens, with a few merges: characters of several tokens, words with their space, newlines."""
    merges = [("\u0120", "t"), ("h", "e"), ("\u0120t", "he"), ("\u010a", "\u0120")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<eos>", "<mask>", *alphabet, *(a + b for a, b in merges)]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", mask_token="<mask>")


@pytest.fixture
def record(tokenizer):
    """record(text, L, index): a row whose tokens are committed two a step from both ends, then EOS; L - n never committed."""

    def make(text: str, L: int | None = None, index: int = 0, statistics: bool = True) -> dict:
        tokens = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        n = len(tokens)
        steps = [min(i, n - 1 - i) + 1 for i in range(n)]
        rest = (L or n) - n
        made = {
            "index": index, "prompt": f"prompt {index} {HOSTILE}", "text": text, "length": n, "nfe": max(steps),
            "seconds": 0.5, "gamma": 0.1, "tokens": tokens + [tokenizer.eos_token_id] * rest, "commit_step": steps + [0] * rest,
        }  # fmt: skip
        if statistics:
            made |= {
                "logprob": [-0.25] * n + [0.0] * rest,
                "entropy": [0.5 + i / 1000 for i in range(n)] + [0.0] * rest,
            }
        return made

    return make


# ---- the file


def test_hostile_text_is_data(record, tokenizer):
    page = Page(trace_page([record(HOSTILE)], tokenizer, FACTS | {"model": HOSTILE}))
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert "img" not in [tag for tag, _ in page.tags]
    (row,) = page.data
    assert row["text"] == HOSTILE
    assert "".join(row["pieces"]) == HOSTILE + "<eos>"
    assert not set(page.json) & set("<>&")
    assert page.json.isascii()


def test_the_page_is_self_contained_and_its_policy_allows_its_own_code_alone(record, tokenizer):
    assert_self_contained(trace_page([record("the end")], tokenizer, FACTS))


def test_the_page_without_scripts_holds_the_text(record, tokenizer):
    text = trace_page([record("the end & more")], tokenizer, FACTS)
    assert "<pre>the end &amp; more</pre>" in text


def test_pieces_make_up_the_text(tokenizer):
    text = "in the\n café 李雷 🙂\t<b>\u202e x"
    ids = tokenizer(text)["input_ids"]
    pieces = token_pieces(ids, tokenizer)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert " the" in pieces
    at = pieces.index("🙂")
    assert pieces[at - 3 : at] == ["", "", ""]  # four bytes, the character at the last


def test_broken_bytes_are_shown_as_such(tokenizer):
    smile, x = tokenizer("🙂")["input_ids"], tokenizer("x")["input_ids"]
    for ids in ([*smile[:2], *x], smile[:3], smile[1:3] * 6 + x):
        pieces = token_pieces(ids, tokenizer)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == tokenizer.decode(ids)
    assert "\N{REPLACEMENT CHARACTER}" in pieces[-1] + pieces[0] + "".join(pieces)


def test_json_for_html_round_trips():
    value = {"a": [HOSTILE, "\ud800", None, 1.5]}
    assert json.loads(json_for_html(value)) == value
    with pytest.raises(ValueError, match="JSON"):
        json_for_html(float("nan"))


# ---- in a browser


@pytest.fixture
def open_page(open_file, tmp_path, tokenizer):
    """open_page(records, **context): the page in a fresh tab."""

    def open_(records, facts=FACTS, **options):
        path = tmp_path / "trace.html"
        path.write_text(trace_page(records, tokenizer, facts), encoding="utf-8")
        return open_file(path, **options)

    return open_


def states(page) -> str:
    """One letter per token: m masked, n committed now, c committed before."""
    script = (
        "all => all.map(t => t.classList.contains('masked') ? 'm' : t.classList.contains('now') ? 'n' : 'c').join('')"
    )
    return page.locator(".token").evaluate_all(script)


def slide(page, step: int) -> None:
    page.locator("#step").evaluate("(e, s) => { e.value = s; e.dispatchEvent(new Event('input')) }", step)


def test_slider_and_buttons_show_the_latent_of_the_step(record, open_page):
    page = open_page([record("abcde", L=8)])  # steps 1 2 3 3 2 1, two positions never committed
    assert states(page) == "ccnnccmm"
    slide(page, 0)
    assert states(page) == "mmmmmmmm"
    assert page.locator("#status").inner_text() == "Step 0 of 3 all masked"
    page.click("#forward")
    assert states(page) == "nmmmmnmm"
    page.keyboard.press("Tab")
    page.locator("#step").focus()
    page.keyboard.press("ArrowRight")
    assert states(page) == "cnmmncmm"
    assert page.locator("#status").inner_text() == "Step 2 of 3 2 tokens committed, 4 in all"
    page.click("#back")
    assert page.locator("#step").input_value() == "1"
    box = page.locator("#chart").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 2 / 3, box["y"] + 20)
    assert states(page) == "cnmmncmm"


def test_play_runs_to_the_end_and_can_be_paused(record, open_page):
    from playwright.sync_api import expect

    page = open_page([record("abcdefghi")])
    page.select_option("#speed", "4")
    page.evaluate("document.activeElement.blur()")
    seen = []
    page.expose_function("note", lambda step: seen.append(int(step)))
    page.evaluate(
        "new MutationObserver(() => note(document.getElementById('step').value)).observe(document.getElementById('status'), {childList: true})"
    )
    page.click("#play")
    assert page.locator("#play").inner_text() == "Pause"
    expect(page.locator("#play")).to_have_text("Play")
    assert seen == [0, 1, 2, 3, 4, 5]
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Space")
    expect(page.locator("#step")).to_have_value("1")
    page.keyboard.press("Space")
    paused = page.locator("#step").input_value()
    page.wait_for_timeout(400)
    assert page.locator("#step").input_value() == paused != "5"


def test_hover_and_focus_tell_about_the_token(record, tokenizer, open_page):
    row = record("in the end")
    page = open_page([row])
    tip = page.locator("#tip")
    assert tip.is_hidden()
    at = row["tokens"].index(tokenizer.convert_tokens_to_ids("\u0120the"))
    page.hover(f".token[data-index='{at}']")
    shown = tip.inner_text()
    for text in (
        '" the"',
        str(row["tokens"][at]),
        f"{row['commit_step'][at]} of {row['nfe']}",
        "0.779",
        f"{row['entropy'][at]:.3f} nats",
    ):
        assert text in shown
    page.mouse.move(2, 2)
    assert tip.is_hidden()
    slide(page, 0)
    page.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.index") == "1"
    assert "masked" in tip.inner_text()
    assert str(row["tokens"][1]) not in tip.inner_text()
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.dataset.index") == str(row["length"] - 1)
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_masked_tokens_do_not_show_their_text(record, open_page):
    page = open_page([record("abc")], reduced_motion="reduce")
    slide(page, 0)
    assert page.locator(".token").first.evaluate("t => getComputedStyle(t).color") == "rgba(0, 0, 0, 0)"
    assert page.locator(".token").first.get_attribute("aria-label") == "masked"


def test_totals_and_chart(record, open_page):
    page = open_page([record("abcde")])
    totals = page.locator("#totals div").all_inner_texts()
    assert [re.sub(r"\s+", " ", text) for text in totals] == [
        "NFE 3", "tokens 6", "tokens per forward 2.00", "time 500 ms", "tokens/s 12", "entropy bound 0.1 nats",
    ]  # fmt: skip
    assert page.locator(".bar").count() == 3
    assert page.locator("#chart").get_attribute("aria-label") == "Tokens committed per step: 2, 2, 2"


def test_several_prompts_and_a_row_without_statistics(record, open_page):
    page = open_page([record("abc", index=0), record("xyzzy", index=4, statistics=False) | {"gamma": None}])
    assert page.locator("#prompts option").count() == 2
    page.click("#next")
    assert page.locator("#tokens").inner_text().replace("\n", "") == "xyzzy<eos>"
    assert page.locator("#prompt").inner_text().startswith("prompt 4 ")
    assert page.locator("#next").is_disabled()
    page.hover(".token[data-index='0']")
    assert "entropy" not in page.locator("#tip").inner_text()
    page.select_option("#prompts", "0")
    assert page.locator("#tokens").inner_text().replace("\n", "") == "abc<eos>"


def test_hostile_text_stays_text(record, open_page):
    page = open_page([record(HOSTILE), record("b", index=1)], facts=FACTS | {"model": HOSTILE})
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert page.locator("#prompt").text_content() == f"prompt 0 {HOSTILE}"
    assert "</script>" in page.locator("#tokens").text_content()


def test_white_space_is_visible_and_breaks_lines(record, open_page):
    page = open_page([record("a\n b\n\nc\td")])
    tokens = page.locator(".token").all_text_contents()
    assert tokens == ["a", "\u23ce\u00b7", "b", "\u23ce", "\u23ce", "c", "\u21e5", "d", "<eos>"]
    assert page.locator("#tokens br").count() == 3
    tops = page.locator(".token").evaluate_all("all => all.map(t => Math.round(t.getBoundingClientRect().top))")
    assert len(set(tops)) == 4


def test_a_long_completion_stays_usable(record, open_page):
    page = open_page([record("the quick brown fox\n" * 60, L=2048)], viewport={"width": 390, "height": 800})
    assert page.locator(".token").count() == 2048
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#tail").is_visible()
    assert not page.locator("#tail-tokens").is_visible()  # 1,024 positions and more after the end, folded
    milliseconds = page.evaluate(
        "(() => { const t = performance.now(); for (let s = 0; s < 50; s++) goTo(s); return (performance.now() - t) / 50 })()"
    )
    assert milliseconds < 200  # a step is shown 45 ms or longer; room for a busy machine
    slide(page, page.evaluate("row.nfe"))
    assert page.locator(".token.now").first.is_visible()
    top, player = (page.locator(name).first.bounding_box()["y"] for name in (".token.now", "#player"))
    assert 0 <= top < player  # followed, and not under the player


def test_light_and_dark(record, open_page):
    def background(page):
        return page.evaluate("getComputedStyle(document.documentElement).backgroundColor")

    light = open_page([record("abc")], color_scheme="light")
    dark = open_page([record("abc")], color_scheme="dark")
    assert (background(light), background(dark)) == ("rgb(247, 247, 245)", "rgb(19, 20, 23)")
    dark.click("#theme")
    assert background(dark) == background(light)
    assert dark.locator("#theme").inner_text() == "Light"
