"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "class") node.className = value;
      else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined) node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== null));
    return node;
  };

  // ---- colours -------------------------------------------------------------------------------------------------
  const root = document.documentElement;
  const isDark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  $("theme").addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; });

  // ---- the section in view -------------------------------------------------------------------------------------
  const links = new Map([...document.querySelectorAll(".bar a")].map((link) => [link.hash.slice(1), link]));
  const seen = new IntersectionObserver((items) => {
    for (const item of items) {
      if (!item.isIntersecting) continue;
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(item.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-15% 0px -75% 0px" });
  for (const section of document.querySelectorAll("main > section")) seen.observe(section);

  // ---- tables that sort ----------------------------------------------------------------------------------------
  const valueOf = (row, column) => {
    const cell = row.cells[column];
    const given = cell.dataset.sort;
    if (given === undefined) return cell.textContent.trim().toLowerCase();
    return given === "" ? null : Number(given);
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true }));
  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = make("button", { type: "button" }, ...head.childNodes);
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const body = table.tBodies[0];
        const rows = [...body.rows].map((row) => [valueOf(row, column), row]);
        // What was not measured stays at the end, whichever way the rest is sorted.
        rows.sort(([a], [b]) => (a === null) - (b === null) || (a === null ? 0 : (down ? -1 : 1) * compare(a, b)));
        body.append(...rows.map(([, row]) => row));
      });
    });
  }

  // ---- the filter of the models --------------------------------------------------------------------------------
  const rows = [...$("model-table").tBodies[0].rows];
  const applyFilter = () => {
    const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const text = row.cells[0].textContent.toLowerCase();
      const isShown = words.every((word) => text.includes(word))
        && (!$("point").value || row.dataset.point === $("point").value)
        && !($("undominated").checked && row.classList.contains("dominated"));
      row.hidden = !isShown;
      count += isShown;
    }
    $("shown").textContent = `${count} of ${rows.length} models`;
  };
  for (const id of ["filter", "point", "undominated"]) $(id).addEventListener("input", applyFilter);
  applyFilter();

  // ---- replies that flipped ------------------------------------------------------------------------------------
  const PAGE = 10;
  const store = $("transcript-data");
  if (!store) return;
  const state = { data: null, listed: [], count: PAGE };

  const unpack = async (text) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  };

  const verdictOf = (model, number) => {
    const letter = state.data.verdicts[model][number];
    return letter === "." ? null : state.data.letters[letter];
  };
  const RANK = { bad: 0, odd: 1, good: 2 };
  const directionOf = (kind, before, after) => {
    const [from, to] = [state.data.tones[kind][before], state.data.tones[kind][after]];
    if (from === to || from === "odd" && to === "odd") return "other";
    return RANK[to] > RANK[from] ? "better" : "worse";
  };

  const find = () => {
    const [from, to] = [$("from").value, $("to").value];
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const all = [];
    state.data.prompts.forEach((prompt, number) => {
      const [before, after] = [verdictOf(from, number), verdictOf(to, number)];
      if (before === null || after === null || before === after) return;
      all.push({ prompt, number, before, after, direction: directionOf(prompt.kind, before, after) });
    });
    const tally = (direction) => all.filter((flip) => flip.direction === direction).length;
    state.listed = all.filter((flip) => (!$("kind").value || flip.prompt.kind === $("kind").value)
      && (!$("change").value || flip.direction === $("change").value)
      && words.every((word) => `${flip.prompt.id} ${flip.prompt.category} ${flip.prompt.set}`.toLowerCase().includes(word)));
    state.count = PAGE;
    $("tally").textContent = from === to ? "Choose two different models."
      : `${all.length} verdicts flipped: ${tally("better")} better, ${tally("worse")} worse, ${tally("other")} other. ${state.listed.length} listed.`;
    list();
  };

  const chip = (kind, verdict) => make("span", { class: `chip ${state.data.tones[kind][verdict]}` }, verdict);
  const titleOf = (model) => state.data.models.find((item) => item.id === model).title;

  const side = (model, flip, verdict) => {
    const box = make("div", { class: "side" }, make("div", { class: "who" }, `${titleOf(model)}: ${verdict}`));
    const found = (state.byPrompt[model] || new Map()).get(flip.number);
    if (!found) {
      box.append(make("p", { class: "hidden-reply" }, "This reply is not part of the page."));
      return box;
    }
    const words = `Reply of ${found[3]} word${found[3] === 1 ? "" : "s"}`;
    if (found[1] === null) {
      box.append(make("div", { class: "below" }, make("span", { class: "hidden-reply" }, `${words}, not part of the page.`),
        make("small", {}, state.data.texts[found[2]])));
      return box;
    }
    const text = state.data.texts[found[1]];
    const shown = make("p", { class: "reply" });
    const hidden = make("span", { class: "hidden-reply" }, `${words}, hidden.`);
    const note = make("small", {}, state.data.texts[found[2]]);
    const button = make("button", { type: "button", "aria-expanded": "false" }, "Reveal");
    const turn = (isOpen) => {
      shown.textContent = isOpen ? text || "(empty)" : "";
      hidden.hidden = isOpen;
      shown.hidden = !isOpen;
      button.textContent = isOpen ? "Hide" : "Reveal";
      button.setAttribute("aria-expanded", String(isOpen));
    };
    button.addEventListener("click", () => turn(hidden.hidden === false));
    turn($("reveal")?.checked ?? false);
    box.append(shown, make("div", { class: "below" }, hidden, button, note));
    return box;
  };

  const item = (flip) => {
    const { prompt } = flip;
    const where = [prompt.category.replaceAll("_", " "), prompt.kind === "benign" ? "harmless" : prompt.kind, prompt.set].filter(Boolean).join(" · ");
    const header = make("header", {}, make("code", {}, prompt.id), make("span", { class: "where" }, where),
      chip(prompt.kind, flip.before), make("span", { "aria-label": "became" }, "→"), chip(prompt.kind, flip.after));
    const text = prompt.text === undefined ? null : promptText(prompt);
    return make("li", { class: "flip" }, header, ...(text ? [text] : []),
      make("div", { class: "sides" }, side($("from").value, flip, flip.before), side($("to").value, flip, flip.after)));
  };

  const promptText = (prompt) => {
    const text = state.data.texts[prompt.text];
    if (prompt.kind !== "harmful") return make("p", { class: "prompt" }, text);
    const details = make("details", { class: "prompt" }, make("summary", {}, "Prompt"), make("span", {}, text));
    details.open = $("reveal")?.checked ?? false;
    return details;
  };

  const list = () => {
    $("flips").replaceChildren(...state.listed.slice(0, state.count).map(item));
    $("more").hidden = state.listed.length <= state.count;
    $("more").textContent = `Show ${Math.min(PAGE, state.listed.length - state.count)} more`;
  };

  const start = (data) => {
    state.data = data;
    state.byPrompt = Object.fromEntries(Object.entries(data.replies).map(([model, found]) => [model, new Map(found.map((entry) => [entry[0], entry]))]));
    for (const id of ["from", "to"]) {
      $(id).append(...data.models.map((model) => make("option", { value: model.id }, model.title)));
      $(id).value = store.dataset[id];
    }
    for (const id of ["from", "to", "kind", "change", "search"]) $(id).addEventListener("input", find);
    $("reveal")?.addEventListener("input", list);
    $("swap").addEventListener("click", () => { [$("from").value, $("to").value] = [$("to").value, $("from").value]; find(); });
    $("more").addEventListener("click", () => {
      const before = state.count;
      state.count += PAGE;
      list();
      $("flips").children[before]?.querySelector("button")?.focus();
    });
    find();
    document.body.dataset.ready = "yes";
  };

  unpack(store.textContent.trim()).then(start).catch((error) => {
    $("tally").textContent = `The replies cannot be unpacked in this browser (${error.message}). Open the page in a newer one.`;
  });
})();
