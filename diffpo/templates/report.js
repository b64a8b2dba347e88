const report = JSON.parse($("data").textContent);

// ---- the value under the pointer, or moved to with the arrow keys

const short = (value, kind) => (kind === "percent" ? `${+(100 * value).toPrecision(3)}%` : String(+value.toPrecision(4)));

function nearest(sorted, target) {
  let best = 0;
  sorted.forEach((at, i) => { if (Math.abs(at - target) < Math.abs(sorted[best] - target)) best = i; });
  return best;
}

// A chart's places from left to right: their share of the width, and what is told there.
function placesOfChart(chart) {
  const updates = [...new Set(chart.curves.flatMap((curve) => curve.at))].sort((a, b) => a - b);
  const [low, high] = chart.x;
  return updates.map((update) => ({
    at: high > low ? (update - low) / (high - low) : 0.5,
    title: `update ${update.toLocaleString("en")}`,
    rows: chart.curves
      .map((curve) => [curve.name, curve, curve.at.indexOf(update)])
      .filter(([, , i]) => i >= 0)
      .map(([name, curve, i]) => [chart.curves.length > 1 ? name : chart.title, short(curve.value[i], chart.kind)]),
  }));
}

function placesOfHistogram(each) {
  const columns = each.updates.length;
  return each.updates.map(([first, last], i) => ({
    at: (i + 0.5) / columns,
    title: first === last ? `update ${first.toLocaleString("en")}` : `updates ${first.toLocaleString("en")} to ${last.toLocaleString("en")}`,
    rows: each.bins.map((bin, b) => [`${bin} nats`, short(each.shares[i][b], "percent")]),
  }));
}

function showTip(plot, place) {
  const list = element("dl");
  for (const [name, value] of place.rows) list.append(element("dt", "", visible(name)), element("dd", "", value));
  const tip = $("tip"), cross = plot.querySelector(".cross");
  tip.replaceChildren(element("strong", "", place.title), list);
  tip.hidden = cross.hidden = false;
  cross.style.left = `${100 * place.at}%`;
  const box = plot.getBoundingClientRect(), size = tip.getBoundingClientRect(), x = box.left + place.at * box.width;
  tip.style.left = `${Math.max(8, x + 14 + size.width < innerWidth - 8 ? x + 14 : x - 14 - size.width)}px`;
  tip.style.top = `${Math.min(Math.max(8, box.top + 8), Math.max(8, innerHeight - size.height - 8))}px`;
}

function hideTip() {
  $("tip").hidden = true;
  for (const cross of document.querySelectorAll(".cross")) cross.hidden = true;
}

function readable(plot, places) {
  let now = places.length - 1;
  const show = (index) => {
    hideTip();
    now = Math.min(Math.max(index, 0), places.length - 1);
    showTip(plot, places[now]);
  };
  const point = (event) => {
    const box = plot.getBoundingClientRect();
    show(nearest(places.map((place) => place.at), (event.clientX - box.left) / box.width));
  };
  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", hideTip);
  plot.addEventListener("focus", () => plot.matches(":focus-visible") && show(now));
  plot.addEventListener("blur", hideTip);
  plot.addEventListener("keydown", (event) => {
    const target = { ArrowLeft: now - 1, ArrowRight: now + 1, PageUp: now - 10, PageDown: now + 10, Home: 0, End: places.length - 1 }[event.key];
    if (event.key === "Escape") hideTip();
    if (target !== undefined) { show(target); event.preventDefault(); }
  });
}

for (const figure of document.querySelectorAll("[data-chart]")) readable(figure.querySelector(".plot"), placesOfChart(report.charts[figure.dataset.chart]));
for (const figure of document.querySelectorAll("[data-histogram]")) readable(figure.querySelector(".plot"), placesOfHistogram(report.histograms[figure.dataset.histogram]));
addEventListener("scroll", hideTip, { passive: true });

// ---- sample answers

const PLAY_MS = [40, 600]; // of a step
let answer, elements, timer = null;

function option(value, label) {
  const made = element("option", "", label);
  made.value = value;
  return made;
}

function showPrompt(index, update) {
  const sample = report.samples[index];
  $("prompt").textContent = sample.prompt.trim().replace(/[\x00-\x08\x0b-\x1f\x7f]/g, (c) => picture(c.charCodeAt(0)));
  $("answers").replaceChildren(...sample.answers.map((each, i) => option(i, each.update === 0 ? "0, untrained" : each.update.toLocaleString("en"))));
  const same = sample.answers.findIndex((each) => each.update === update);
  showAnswer(same < 0 ? sample.answers.length - 1 : same);
}

function showAnswer(index) {
  pause();
  $("answers").value = index;
  answer = report.samples[$("prompts").value].answers[index];
  const verdict = { true: ["right", "better"], false: ["wrong", "worse"], null: ["undecided", ""] }[answer.correct];
  const facts = [answer.reward === null ? "no reward" : `reward ${short(answer.reward)}`, `${answer.nfe} NFE`, plural(answer.pieces.length, "token")];
  if (answer.gamma !== null) facts.push(`threshold ${answer.gamma} nats`);
  $("grade").replaceChildren(element("b", verdict[1], verdict[0]), `, ${facts.join(", ")}`);
  const made = document.createDocumentFragment();
  elements = answer.pieces.map((piece, i) => {
    const token = element("span", answer.special[i] ? "token special" : "token");
    token.setAttribute("role", "listitem");
    if (answer.steps[i] > 0) token.style.setProperty("--t", answer.nfe > 1 ? (answer.steps[i] - 1) / (answer.nfe - 1) : 0);
    token.append(...tokenText(piece));
    if (/^ \S/.test(piece)) made.append(" "); // collapses where a line breaks
    made.append(token, ...lineBreaks(piece));
    return token;
  });
  $("tokens").replaceChildren(made);
  $("step").max = answer.nfe;
  goTo(answer.nfe);
}

function goTo(step) {
  answer.steps.forEach((at, i) => {
    const masked = at === 0 || at > step;
    elements[i].classList.toggle("masked", masked);
    elements[i].classList.toggle("now", at > 0 && at === step);
    elements[i].setAttribute("aria-label", masked ? "masked" : visible(answer.pieces[i]));
  });
  $("step").value = step;
  $("step").setAttribute("aria-valuetext", `step ${step} of ${answer.nfe}`);
  $("status").textContent = `step ${step} of ${answer.nfe}`;
}

function tick() {
  const step = Number($("step").value);
  if (step >= answer.nfe) return pause();
  goTo(step + 1);
  timer = setTimeout(tick, Math.min(Math.max(5000 / answer.nfe, PLAY_MS[0]), PLAY_MS[1]));
}

function play() {
  if (Number($("step").value) >= answer.nfe) goTo(0);
  $("play").textContent = "Pause";
  timer = setTimeout(tick, PLAY_MS[1]);
}

function pause() {
  clearTimeout(timer);
  timer = null;
  $("play").textContent = "Play";
}

if (report.samples.length) {
  $("player").hidden = false;
  $("prompts").append(...report.samples.map((sample, i) => option(i, `${i + 1}. ${visible(sample.prompt.replace(/<\|[^|<>]*\|>/g, " ").replace(/\s+/g, " ").trim().slice(0, 100))}`)));
  $("prompts").addEventListener("change", (event) => showPrompt(Number(event.target.value), answer.update));
  $("answers").addEventListener("change", (event) => showAnswer(Number(event.target.value)));
  $("play").addEventListener("click", () => (timer === null ? play() : pause()));
  $("step").addEventListener("input", (event) => { pause(); goTo(Number(event.target.value)); });
  const steps = report.samples.map((sample) => sample.answers.at(-1).nfe);
  $("prompts").value = steps.indexOf(Math.max(...steps)); // the longest to watch
  showPrompt(Number($("prompts").value));
}
