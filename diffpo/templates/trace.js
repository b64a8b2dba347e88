const rows = JSON.parse(document.getElementById("data").textContent);
const TAIL_SHOWN = 24; // more positions than these after the end of the sequence are folded away
const PLAY_MS = 7000; // of a whole playback at speed 1, within the limits per step below
const STEP_MS = [45, 700];

let row, step, elements, bars, counts, timer = null;

const shade = (at) => (row.nfe > 1 ? (at - 1) / (row.nfe - 1) : 0);

// ---- building one prompt

function show(index) {
  pause();
  hideTip();
  row = rows[index];
  $("prompts").value = String(index);
  $("previous").disabled = index === 0;
  $("next").disabled = index === rows.length - 1;
  $("prompt").textContent = row.prompt;
  counts = new Array(row.nfe + 1).fill(0);
  for (const at of row.commit_step) if (at > 0) counts[at]++;
  showTotals();
  showTokens();
  showChart();
  $("step").max = row.nfe;
  $("last").textContent = row.nfe;
  goTo(row.nfe);
}

function showTotals() {
  const values = [
    ["NFE", row.nfe.toLocaleString("en")],
    ["tokens", row.length.toLocaleString("en")],
    ["tokens per forward", (row.length / row.nfe).toFixed(2)],
  ];
  if (row.seconds) {
    values.push(["time", row.seconds < 1 ? Math.round(row.seconds * 1000) : row.seconds.toFixed(1), row.seconds < 1 ? "ms" : "s"]);
    values.push(["tokens/s", Math.round(row.length / row.seconds).toLocaleString("en")]);
  }
  if (row.gamma !== null) values.push(["entropy bound", typeof row.gamma === "number" ? String(+row.gamma.toPrecision(3)) : row.gamma, "nats"]);
  $("totals").replaceChildren(...values.map(([name, value, unit]) => {
    const pair = element("div"), shown = element("dd", "", String(value));
    if (unit) shown.append(" ", element("small", "", unit));
    pair.append(element("dt", "", name), shown);
    return pair;
  }));
}

function showTokens() {
  const folded = row.tokens.length - row.length > TAIL_SHOWN;
  elements = [];
  const shown = document.createDocumentFragment(), tail = document.createDocumentFragment();
  row.tokens.forEach((_, i) => {
    const target = folded && i >= row.length ? tail : shown;
    const token = tokenElement(i);
    elements.push(token);
    if (/^ \S/.test(row.pieces[i])) target.append(" "); // collapses where a line breaks
    target.append(token);
    target.append(...lineBreaks(row.pieces[i]));
  });
  elements[0].tabIndex = 0;
  $("tokens").replaceChildren(shown);
  $("tail-tokens").replaceChildren(tail);
  $("tail").hidden = !folded;
  $("tail").open = false;
}

function tokenElement(i) {
  const piece = row.pieces[i], token = element("span", "token");
  token.setAttribute("role", "listitem");
  token.dataset.index = i;
  token.tabIndex = -1;
  if (row.special[i]) token.classList.add("special");
  if (i >= row.length) token.classList.add("after");
  if (row.commit_step[i] > 0) token.style.setProperty("--t", shade(row.commit_step[i]));
  token.append(...tokenText(piece));
  return token;
}

function showChart() {
  const most = Math.max(...counts, 1);
  bars = counts.slice(1).map((count, i) => {
    const bar = element("div", "bar");
    bar.style.left = `${(100 * (i + 1)) / row.nfe}%`;
    bar.style.width = `min(20px, ${70 / row.nfe}%)`;
    bar.style.height = `${(100 * count) / most}%`;
    bar.style.setProperty("--t", shade(i + 1));
    bar.title = `step ${i + 1}: ${plural(count, "token")}`;
    return bar;
  });
  const peak = element("span", "", `at most ${plural(most, "token")} in a step`);
  peak.id = "peak";
  $("chart").replaceChildren(...bars, peak);
  $("chart").setAttribute("aria-label", `Tokens committed per step: ${counts.slice(1).join(", ")}`);
}

// ---- moving through the steps

function goTo(target) {
  step = Math.min(Math.max(target, 0), row.nfe);
  let done = 0;
  row.commit_step.forEach((at, i) => {
    const masked = at === 0 || at > step, now = at > 0 && at === step;
    done += !masked;
    elements[i].classList.toggle("masked", masked);
    elements[i].classList.toggle("now", now);
    elements[i].setAttribute("aria-label", masked ? "masked" : `${visible(row.pieces[i])}, step ${at}${now ? ", now" : ""}`);
  });
  bars.forEach((bar, i) => {
    bar.classList.toggle("later", i + 1 > step);
    bar.classList.toggle("now", i + 1 === step);
  });
  $("step").value = step;
  $("step").setAttribute("aria-valuetext", `step ${step} of ${row.nfe}`);
  $("back").disabled = step === 0;
  $("forward").disabled = step === row.nfe;
  const text = step === 0 ? "all masked" : `${plural(counts[step], "token")} committed, ${done.toLocaleString("en")} in all`;
  $("status").replaceChildren(element("b", "", `Step ${step} of ${row.nfe}`), " ", element("span", "", text));
  const after = row.commit_step.slice(row.length);
  $("tail").firstElementChild.textContent =
    `${plural(after.length, "position")} after the end of the sequence, ${after.filter((at) => at > 0 && at <= step).length} of them committed`;
}

// Keep what is committed now in sight; the text alone scrolls, the player is sticky.
function follow() {
  const now = elements.find((token) => token.classList.contains("now"));
  if (now?.offsetParent) now.scrollIntoView({ block: "nearest" });
}

function play() {
  if (step === row.nfe) goTo(0);
  $("play").classList.add("playing");
  setPlayButton("Pause", "M4 2.5h3v11H4zM9.5 2.5h3v11h-3z");
  $("status").setAttribute("aria-live", "off");
  tick();
}

function tick() {
  const pace = Math.min(Math.max(PLAY_MS / row.nfe, STEP_MS[0]), STEP_MS[1]) / Number($("speed").value);
  timer = setTimeout(() => {
    goTo(step + 1);
    follow();
    if (step === row.nfe) pause();
    else tick();
  }, pace);
}

function pause() {
  clearTimeout(timer);
  timer = null;
  $("play").classList.remove("playing");
  $("status").setAttribute("aria-live", "polite");
  setPlayButton("Play", "M4 2.5v11l9-5.5z");
}

function setPlayButton(label, path) {
  $("play").querySelector("span").textContent = label;
  $("play").querySelector("path").setAttribute("d", path);
}

const toggle = () => (timer === null ? play() : pause());
const moveTo = (target) => { pause(); goTo(target); follow(); };

// ---- the token under the pointer or the focus

function showTip(token) {
  const i = Number(token.dataset.index), at = row.commit_step[i], masked = at === 0 || at > step;
  const name = masked ? "masked" : row.pieces[i] ? `"${visible(row.pieces[i])}"` : "part of a character";
  const facts = [["position", i + 1]];
  if (!masked) {
    facts.push(["token id", row.tokens[i]], ["commit step", `${at} of ${row.nfe}`]);
    if (row.logprob) facts.push(["probability", Math.exp(row.logprob[i]).toFixed(3)]);
    if (row.entropy) facts.push(["entropy", `${row.entropy[i].toFixed(3)} nats`]);
  } else if (at === 0) facts.push(["commit step", "never"]);
  const list = element("dl");
  for (const [key, value] of facts) list.append(element("dt", "", key), element("dd", "", String(value)));
  const tip = $("tip");
  tip.replaceChildren(element("strong", "", name), list);
  tip.hidden = false;
  const box = token.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const above = box.top - size.height - 8, below = box.bottom + 8;
  const fits = below + size.height < $("player").getBoundingClientRect().top;
  tip.style.top = `${fits || above < 4 ? below : above}px`;
  tip.style.left = `${Math.min(Math.max(8, box.left + box.width / 2 - size.width / 2), innerWidth - size.width - 8)}px`;
  token.setAttribute("aria-describedby", "tip");
}

function hideTip() {
  $("tip").hidden = true;
}

function focusToken(i) {
  const target = elements[i];
  if (!target || (target.closest("details") && !$("tail").open)) return;
  for (const token of elements) token.tabIndex = -1;
  target.tabIndex = 0;
  target.focus();
}

const tokenAt = (event) => event.target.closest?.(".token");
for (const area of [$("tokens"), $("tail-tokens")]) {
  area.addEventListener("pointerover", (event) => (tokenAt(event) ? showTip(tokenAt(event)) : hideTip()));
  area.addEventListener("pointerleave", hideTip);
  area.addEventListener("focusin", (event) => tokenAt(event) && showTip(tokenAt(event)));
  area.addEventListener("focusout", hideTip);
}
addEventListener("scroll", () => document.activeElement.classList.contains("token") || hideTip(), { passive: true });

// ---- controls

rows.forEach((each, i) => {
  const label = `${each.index + 1}. ${each.prompt.replace(/\s+/g, " ").slice(0, 100)}`;
  const option = element("option", "", label);
  option.value = i;
  $("prompts").append(option);
});
$("chooser").hidden = rows.length === 1;
$("prompts").addEventListener("change", (event) => show(Number(event.target.value)));
$("previous").addEventListener("click", () => show(Number($("prompts").value) - 1));
$("next").addEventListener("click", () => show(Number($("prompts").value) + 1));
$("play").addEventListener("click", toggle);
$("back").addEventListener("click", () => moveTo(step - 1));
$("forward").addEventListener("click", () => moveTo(step + 1));
$("step").addEventListener("input", (event) => moveTo(Number(event.target.value)));
$("chart").addEventListener("click", (event) => {
  const box = $("chart").getBoundingClientRect();
  moveTo(Math.round(((event.clientX - box.left) / box.width) * row.nfe));
});

addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const token = tokenAt(event);
  if (event.key === "Escape") return hideTip();
  if (token) {
    const i = Number(token.dataset.index);
    const target = { ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: row.length - 1 }[event.key];
    if (target !== undefined) { focusToken(target); event.preventDefault(); }
  } else if (event.target.closest("input, select, summary")) return;
  else {
    const target = { ArrowLeft: step - 1, ArrowRight: step + 1, Home: 0, End: row.nfe }[event.key];
    if (target !== undefined) { moveTo(target); event.preventDefault(); }
  }
  if (event.key === " " && !event.target.closest("button, input, select, summary")) { toggle(); event.preventDefault(); }
});

show(0);
