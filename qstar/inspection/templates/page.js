"use strict";
(() => {
  const texts = document.getElementById("texts");
  const panel = document.getElementById("token");
  const status = document.getElementById("status");
  const form = document.getElementById("switch");
  const tokens = [...texts.querySelectorAll(".t")];
  const order = new Map(tokens.map((token, number) => [token, number]));
  let data = null;
  let chosen = null;
  let held = false;
  let pointed = "";

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

  function likely(name, values) {
    const shown = values.flatMap(([text, probability]) =>
      [" ", made("span", [made("b", data.strings[text]), ` ${(100 * probability).toFixed(1)}%`])]);
    return made("p", [made("span", name), ...shown], "likely");
  }

  function thought({tokens, log_probs, weight, advantage, entropy}) {
    const pieces = tokens.flatMap((token, number) => [data.strings[token], made("sub", plain(log_probs[number], 2))]);
    const facts = [`weight ${plain(weight)}`, `entropy ${plain(entropy)} nats`];
    if (advantage !== null) facts.push(`advantage ${signed(advantage)}`);
    return made("div", [made("p", pieces, "thought"), made("p", facts.join(", "))]);
  }

  function show(token) {
    data ??= JSON.parse(document.getElementById("data").textContent);
    const [text, number] = token.id.slice(1).split("-").map(Number);
    const {tokens, positions} = data.documents[text];
    const position = positions[number - 1];
    const title = made("h2", ["⟦", data.strings[tokens[number]], "⟧"], "thought");
    const place = made("p", `text ${text + 1}, token ${number + 1}`);
    if (!position) {
      status.textContent = "no thought stands before this token";
      panel.replaceChildren(title, place);
      return;
    }
    const {base, talk, gain, weight} = position;
    status.textContent = gain[0] === null
      ? "this token is not predicted" : `gain ${signed(gain[0])} nats, weight ${plain(weight)}`;
    const ahead = base.flatMap((value, step) => value === null ? [] :
      [[data.strings[tokens[number + step]], plain(value), plain(talk[step]), signed(gain[step])]]);
    panel.replaceChildren(
      title, place,
      table(["ahead", "without", "with", "gain"], ahead),
      made("h2", "Thoughts before it"), ...position.rationales.map(thought),
      made("h2", "Likeliest"), likely("without", position.before), likely("with", position.after));
  }

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
})();
