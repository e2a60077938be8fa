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

// Has pointer, keys and links choose a token of the texts, and `show` it.
function choosing(show) {
  const texts = document.getElementById("texts");
  const form = document.getElementById("switch");
  const tokens = [...texts.querySelectorAll(".t")];
  const order = new Map(tokens.map((token, number) => [token, number]));
  let chosen = null;
  let held = false;
  let pointed = "";

  function choose(token) {
    if (token === chosen) return;
    chosen?.classList.remove("chosen");
    chosen = token;
    chosen.classList.add("chosen");
    show(token);
  }

  function hold(yes) {
    chosen?.classList.toggle("held", yes);
    held = yes;
  }

  function level(token) {
    return Number(token.getAttribute(`data-${document.body.dataset.show[0]}`) ?? 0);
  }

  function beside(token, key) {
    const step = key === "ArrowLeft" || key === "ArrowUp" ? -1 : 1;
    const coloured = key === "ArrowUp" || key === "ArrowDown";
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
    else if (event.key.startsWith("Arrow")) beside(token, event.key)?.focus();
    else if (event.key === "Home") tokens[0].focus();
    else if (event.key === "End") tokens.at(-1).focus();
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
  return {tokens, choose, chosen: () => chosen};
}
