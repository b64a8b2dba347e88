"use strict";
// Text from the data reaches the page through textContent and attributes alone, never as markup.
const $ = (id) => document.getElementById(id);

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
const picture = (code) => String.fromCharCode(code === 127 ? 0x2421 : 0x2400 + code); // of a control character
const visible = (text) => text.replace(/\n/g, "\u23ce").replace(/\t/g, "\u21e5").replace(/[\x00-\x1f\x7f]/g, (c) => picture(c.charCodeAt(0)));
const marked = (text) => visible(text).replace(/ /g, "\u00b7");

// ---- tokens

// After a token with newlines: the break (two at most), then the indentation that the token ends with.
function lineBreaks(piece) {
  const lines = piece.split("\n"), made = [];
  for (let n = 1; n < Math.min(lines.length, 3); n++) made.push(element("br"));
  if (made.length && /^ +$/.test(lines.at(-1))) {
    const indent = element("span", "indent");
    indent.style.width = `${lines.at(-1).length}ch`;
    made.push(indent);
  }
  return made;
}

function tokenText(piece) {
  const text = piece.replace(/^ (?=\S)/, "") || "\u2026"; // the space before a word stands between the tokens
  return text.match(/\s+|\S+/g).map((part) => (/\s/.test(part) ? element("span", "mark", marked(part)) : visible(part)));
}

// ---- light and dark

const THEMES = { Auto: "light dark", Light: "light", Dark: "dark" };
$("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES), chosen = names[(names.indexOf($("theme").textContent) + 1) % names.length];
  document.documentElement.style.colorScheme = THEMES[chosen];
  $("theme").textContent = chosen;
  $("theme").setAttribute("aria-label", `Colour theme: ${chosen === "Auto" ? "automatic" : chosen.toLowerCase()}`);
});
