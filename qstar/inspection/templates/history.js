(() => {
  const panel = document.getElementById("token");
  const status = document.getElementById("status");
  const slider = document.getElementById("step");
  const play = document.getElementById("play");
  const markers = document.querySelectorAll(".marker");
  const {steps, strings} = JSON.parse(document.getElementById("data").textContent);
  const PAUSE = 700; // milliseconds that a step is seen while they play
  let playing = null;

  // A token at each step: how its thought changed.
  function show(token) {
    const [text, number] = place_of(token);
    const heading = heading_of(token, token.textContent);
    const now = steps[slider.value].texts[text][number - 1];
    status.textContent = numbers(now && {gain: now[1], weight: now[2]});
    if (!now) {
      panel.replaceChildren(...heading);
      return;
    }
    const [before, after] = now.slice(4);
    const rows = steps.map(({step, texts}) => {
      const [, itsGain, itsWeight, thought] = texts[text][number - 1];
      return [String(step), signed(itsGain, 2), plain(itsWeight, 2), `⟨${strings[thought]}⟩`];
    });
    const shown = table(["step", "gain", "weight", "first thought before it"], rows);
    const bodies = [...shown.querySelectorAll("tbody tr")];
    for (const row of bodies) row.lastChild.className = "thought";
    bodies[slider.value].setAttribute("aria-current", "step");
    const likely = ([string, probability]) => [made("b", strings[string]), ` ${(100 * probability).toFixed(1)}%`];
    panel.replaceChildren(
      ...heading,
      made("p", ["likeliest without ", ...likely(before), ", with ", ...likely(after)], "likely"), shown);
    const side = panel.parentElement;
    side.scrollTop = bodies[slider.value].offsetTop - side.clientHeight / 2;
  }

  slider.value = slider.max; // which a browser may keep through a reload
  const chooser = choosing(show);

  function turn() {
    const {step, page, gain: [mean, low, high], texts} = steps[slider.value];
    for (const token of chooser.tokens) {
      const [text, number] = place_of(token);
      const levels = texts[text][number - 1]?.[0];
      if (levels?.length) ["g", "w", "s"].forEach((name, at) => token.setAttribute(`data-${name}`, levels[at]));
    }
    const interval = low === null ? "" : ` [${signed(low, 4)}, ${signed(high, 4)}]`;
    slider.setAttribute("aria-valuetext", `step ${step}`);
    document.getElementById("number").textContent = `step ${step}`;
    document.getElementById("figure").textContent = `thoughts gain ${signed(mean, 4)}${interval}`;
    document.getElementById("whole").setAttribute("href", page);
    for (const marker of markers) {
      const x = marker.dataset.places.split(" ")[slider.value];
      marker.setAttribute("x1", x);
      marker.setAttribute("x2", x);
    }
    if (chooser.chosen()) show(chooser.chosen());
  }

  // Where thoughts gain most at the last step.
  function best() {
    const gain = (token) => {
      const [text, number] = place_of(token);
      return steps.at(-1).texts[text][number - 1]?.[1] ?? -Infinity;
    };
    return chooser.tokens.reduce((one, other) => (gain(other) > gain(one) ? other : one));
  }

  function go(by) {
    slider.value = Number(slider.value) + by;
    turn();
  }

  function stop() {
    clearInterval(playing);
    playing = null;
    play.textContent = "Play";
  }

  play.addEventListener("click", () => {
    if (playing) {
      stop();
      return;
    }
    if (slider.value === slider.max) slider.value = 0;
    turn();
    play.textContent = "Pause";
    playing = setInterval(() => {
      go(1);
      if (slider.value === slider.max) stop();
    }, PAUSE);
  });
  slider.addEventListener("input", () => {
    stop();
    turn();
  });
  document.getElementById("texts").addEventListener("keydown", (event) => {
    if (event.key !== "PageUp" && event.key !== "PageDown") return;
    stop();
    go(event.key === "PageUp" ? -1 : 1);
    event.preventDefault();
  });
  document.getElementById("steps").addEventListener("submit", (event) => event.preventDefault());
  turn();
  if (!chooser.chosen()) chooser.choose(best());
})();
