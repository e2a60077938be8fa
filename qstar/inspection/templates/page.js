"use strict";
(() => {
  const texts = document.getElementById("texts");
  const panel = document.getElementById("token");
  const status = document.getElementById("status");
  const form = document.getElementById("switch");
  // A text stands in a column for each model: the ids of its tokens differ between these in their first letter alone.
  const columns = new Map();
  const order = new Map();
  for (const token of texts.querySelectorAll(".t")) {
    if (!columns.has(token.id[0])) columns.set(token.id[0], []);
    order.set(token, columns.get(token.id[0]).push(token) - 1);
  }
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

  function thought({tokens, log_probs, weight, advantage, entropy, gain}) {
    const pieces = tokens.flatMap((token, number) => [data.strings[token], made("sub", plain(log_probs[number], 2))]);
    const facts = [`weight ${plain(weight)}`, `entropy ${plain(entropy)} nats`];
    if (advantage !== null) facts.push(`advantage ${signed(advantage)}`);
    if (gain !== null) facts.push(`gain ${signed(gain)}`);
    return made("div", [made("p", pieces, "thought"), made("p", facts.join(", "))]);
  }

  function details({base, talk, gain, before, after, rationales}, name, heading) {
    const ahead = base.flatMap((value, step) => value === null ? [] :
      [[name(step), plain(value), plain(talk[step]), signed(gain[step])]]);
    return [
      table(["ahead", "without", "with", "gain"], ahead),
      made(heading, "Thoughts before it"), ...rationales.map(thought),
      made(heading, "Likeliest"), likely("without", before), likely("with", after)];
  }

  function told(position) {
    if (!position) return "no thought stands before this token";
    if (position.gain[0] === null) return "this token is not predicted";
    return `gain ${signed(position.gain[0])} nats, weight ${plain(position.weight)}`;
  }

  function differences(positions, {talk, base, gain}) {
    const row = (name, shown, value, difference) => [name, ...positions.map((each) => shown(value(each))), difference];
    return table(["next token", ...data.models.map(({name}) => name), "difference"], [
      row("with", plain, (each) => each.talk[0], signed(talk)),
      row("without", plain, (each) => each.base[0], signed(base)),
      row("gain", signed, (each) => each.gain[0], signed(gain)),
      row("weight", plain, (each) => each.weight, ""),
    ]);
  }

  function beside(positions, difference, name) {
    const sections = positions.map((position, side) => made("section", [
      made("h2", data.models[side].name),
      ...(position ? details(position, name, "h3") : [made("p", told(position))]),
    ]));
    return [...(difference ? [differences(positions, difference)] : []), made("div", sections, "pair")];
  }

  function show(token) {
    data ??= JSON.parse(document.getElementById("data").textContent);
    const [text, number] = token.id.slice(1).split("-").map(Number);
    const models = data.models ?? [data];
    const name = (step) => data.strings[models[0].documents[text].tokens[number + step]];
    const positions = models.map(({documents}) => documents[text].positions[number - 1]);
    const difference = data.differences?.[text][number - 1];
    const title = made("h2", ["⟦", name(0), "⟧"], "thought");
    const place = made("p", `text ${text + 1}, token ${number + 1}`);
    const known = positions.some(Boolean);
    if (data.models && known) {
      const facts = positions.map((position, side) => `${models[side].name}: ${told(position)}`);
      if (difference) facts.unshift(`difference ${signed(difference.talk)} nats`);
      status.textContent = facts.join("; ");
      panel.replaceChildren(title, place, ...beside(positions, difference, name));
    } else {
      status.textContent = told(positions[0]);
      panel.replaceChildren(title, place, ...(known ? details(positions[0], name, "h2") : []));
    }
  }

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
})();
