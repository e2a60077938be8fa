(() => {
  const panel = document.getElementById("token");
  const status = document.getElementById("status");
  let data = null;

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

  const told = (position) => numbers(position && {gain: position.gain[0], weight: position.weight});

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
    const [text, number] = place_of(token);
    const models = data.models ?? [data];
    const name = (step) => data.strings[models[0].documents[text].tokens[number + step]];
    const positions = models.map(({documents}) => documents[text].positions[number - 1]);
    const difference = data.differences?.[text][number - 1];
    const heading = heading_of(token, name(0));
    const known = positions.some(Boolean);
    if (data.models && known) {
      const facts = positions.map((position, side) => `${models[side].name}: ${told(position)}`);
      if (difference) facts.unshift(`difference ${signed(difference.talk)} nats`);
      status.textContent = facts.join("; ");
      panel.replaceChildren(...heading, ...beside(positions, difference, name));
    } else {
      status.textContent = told(positions[0]);
      panel.replaceChildren(...heading, ...(known ? details(positions[0], name, "h2") : []));
    }
  }

  choosing(show);
})();
