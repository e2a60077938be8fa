"use strict";

const signed = (value, digits = 3) => (value === null ? "" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits));
const plain = (value, digits = 3) => (value === null ? "" : (value < 0 ? "−" : "") + Math.abs(value).toFixed(digits));

// Text enters the page through textContent alone, so that none of it can become markup.
function made(name, content = "", kind = "") {
  const element = document.createElement(name);
  if (kind) element.className = kind;
  for (const each of [content].flat()) element.append(each);
  return element;
}

function table(header, rows) {
  const cells = (name, values) => values.map((value) => made(name, value));
  return made("table", [
    made("thead", made("tr", cells("th", header))),
    made("tbody", rows.map((row) => made("tr", cells("td", row)))),
  ]);
}

// Numbers of the text that a token stands in and of the token, from 0.
function place_of(token) {
  return token.id.slice(1).split("-").map(Number);
}

// What is above whatever is shown of a token, which reads `name`.
function heading_of(token, name) {
  const [text, number] = place_of(token);
  return [made("h2", ["⟦", name, "⟧"], "thought"), made("p", `text ${text + 1}, token ${number + 1}`)];
}

// What a thought before a token did, in a line; nothing is known where there is none.
function numbers(known) {
  if (!known) return "no thought stands before this token";
  if (known.gain === null) return "this token is not predicted";
  return `gain ${signed(known.gain)} nats, weight ${plain(known.weight)}`;
}

// Has pointer, keys and links choose a token of the texts, and `show` it.
function choosing(show) {
  const texts = document.getElementById("texts");
  const form = document.getElementById("switch");
  // A text stands in a column for each model: the ids of its tokens differ between these in their first letter alone.
  const columns = new Map();
  const order = new Map();
  for (const token of texts.querySelectorAll(".t")) {
    if (!columns.has(token.id[0])) columns.set(token.id[0], []);
    order.set(token, columns.get(token.id[0]).push(token) - 1);
  }
  let chosen = null;
  let held = false;
  let pointed = "";

  function choose(token) {
    if (token === chosen) return;
    for (const twin of twins(chosen)) twin.classList.remove("chosen");
    chosen = token;
    for (const twin of twins(chosen)) twin.classList.add("chosen");
    show(token);
  }

  function hold(yes) {
    for (const twin of twins(chosen)) twin.classList.toggle("held", yes);
    held = yes;
  }

  // The token in every column.
  function twins(token) {
    return token ? [...columns.keys()].map((letter) => document.getElementById(letter + token.id.slice(1))) : [];
  }

  function level(token) {
    return Number(token.getAttribute(`data-${document.body.dataset.show[0]}`) ?? 0);
  }

  function next(token, key) {
    const step = key === "ArrowLeft" || key === "ArrowUp" ? -1 : 1;
    const coloured = key === "ArrowUp" || key === "ArrowDown";
    const tokens = columns.get(token.id[0]);
    let number = order.get(token) + step;
    while (coloured && tokens[number] && level(tokens[number]) === 0) number += step;
    return tokens[number];
  }

  const token_of = (event) => (event.target instanceof Element ? event.target.closest("#texts .t") : null);

  // Text that scrolls under a pointer at rest is not pointed at: keys and links would lose their token to it.
  texts.addEventListener("pointermove", (event) => {
    const spot = `${event.screenX} ${event.screenY}`;
    if (spot === pointed) return;
    pointed = spot;
    const token = token_of(event);
    if (token && !held) choose(token);
  });
  texts.addEventListener("focusin", (event) => {
    const token = token_of(event);
    if (!token) return;
    if (token !== chosen) hold(false);
    for (const each of token.closest(".text").querySelectorAll('.t[tabindex="0"]')) each.tabIndex = -1;
    token.tabIndex = 0;
    choose(token);
  });
  texts.addEventListener("click", (event) => {
    if (token_of(event)) hold(!held);
  });
  texts.addEventListener("keydown", (event) => {
    const token = token_of(event);
    if (!token || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "Enter" || event.key === " ") hold(!held);
    else if (event.key === "Escape") hold(false);
    else if (event.key.startsWith("Arrow")) next(token, event.key)?.focus();
    else if (event.key === "Home") columns.get(token.id[0])[0].focus();
    else if (event.key === "End") columns.get(token.id[0]).at(-1).focus();
    else return;
    event.preventDefault();
  });

  function jump() {
    const token = document.getElementById(location.hash.slice(1));
    if (!order.has(token)) return;
    token.scrollIntoView({block: "center"});
    token.focus({preventScroll: true});
  }
  function colour() {
    document.body.dataset.show = new FormData(form).get("show");
  }
  window.addEventListener("hashchange", jump);
  form.addEventListener("change", colour);
  colour();
  jump();
  return {tokens: [...order.keys()], choose, chosen: () => chosen};
}
