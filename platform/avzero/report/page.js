"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const trials = data.trials;
  const form = document.getElementById("filters");
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const wanted = () => Object.fromEntries(["dataset", "features", "model", "preset", "text"].map((k) => [k, form.elements[k].value]));
  const fits = (value, asked) => !asked || value === asked;

  // -- filters ---------------------------------------------------------------------------------
  function filter() {
    const f = wanted();
    const published = form.elements.published.checked;
    let shown = 0, total = 0;
    for (const key of Object.keys(f)) form.elements[key].classList.toggle("set", f[key] !== "");
    for (const board of all(".board")) {
      const here = fits(board.dataset.dataset, f.dataset) && fits(board.dataset.features, f.features);
      let any = false;
      for (const body of all("tbody", board)) {
        const ours = body.classList.contains("ours");
        // Preset and text set are ours to choose: published rows have neither.
        const part = here && (ours ? fits(body.dataset.preset, f.preset) && fits(body.dataset.text, f.text) : published && !f.preset && !f.text);
        let some = false;
        for (const row of all("tr.row", body)) {
          row.hidden = !(part && fits(row.dataset.model, f.model));
          total += 1;
          shown += !row.hidden;
          some ||= !row.hidden;
        }
        body.hidden = !some;
        any ||= some;
      }
      for (const figures of all(".figures", board)) {
        let some = false;
        for (const part of all("[data-row]", figures)) {
          const row = rowOf(part.dataset.row);
          part.toggleAttribute("hidden", !row || row.hidden);
          some ||= !part.hasAttribute("hidden");
        }
        figures.hidden = !some;
      }
      board.hidden = !any;
    }
    const part = document.getElementById("published");
    if (part) part.hidden = !all(".board.alone").some((board) => !board.hidden);
    document.getElementById("count").textContent = `${shown} of ${total} rows`;
    document.getElementById("nothing").hidden = shown > 0;
    chosen = null;
    page = 0;
    list();
  }
  const rows = new Map(all("tr.row[data-row]").map((row) => [row.dataset.row, row]));
  const rowOf = (id) => rows.get(id);

  // -- sorting ---------------------------------------------------------------------------------
  function mark(button) {
    const head = button.closest("th");
    const numbers = head.classList.contains("num") && !head.classList.contains("place");
    const first = numbers ? "descending" : "ascending";
    const other = numbers ? "ascending" : "descending";
    const next = head.getAttribute("aria-sort") === first ? other : first;
    for (const th of all("th[aria-sort]", head.parentElement)) th.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", next);
    return next === "ascending" ? 1 : -1;
  }
  function compare(a, b, sign) {
    if (a === b) return 0;
    if (a === null || a === "") return 1;  // what is missing comes last either way
    if (b === null || b === "") return -1;
    return sign * (typeof a === "number" ? a - b : a < b ? -1 : 1);
  }
  // Cells are found by their place; published rows span several.
  function valueAt(row, column, numeric) {
    let at = 0;
    for (const cell of row.cells) {
      if (at === column) {
        const v = cell.dataset.v ?? "";
        return numeric ? (v === "" ? null : Number(v)) : v;
      }
      at += cell.colSpan;
      if (at > column) return null;
    }
    return null;
  }
  for (const table of all("table.leader")) {
    table.tHead.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      const sign = mark(button);
      const head = button.closest("th");
      const before = [...head.parentElement.cells].slice(0, head.cellIndex);
      const column = before.reduce((sum, cell) => sum + cell.colSpan, 0);
      const numeric = head.classList.contains("num");
      for (const body of table.tBodies) {
        const keyed = all("tr.row", body).map((row) => [valueAt(row, column, numeric), row]);
        keyed.sort((a, b) => compare(a[0], b[0], sign));
        body.append(...keyed.map((pair) => pair[1]));
      }
    });
  }

  // -- the same system lights up in table, legend and charts -----------------------------------
  function light(id, on) {
    for (const part of all("[data-row]")) if (part.dataset.row === id && !part.classList.contains("recalls")) part.classList.toggle("lit", on);
    const row = rowOf(id);
    for (const chart of all(".chart", row ? row.closest(".board") : document)) if (chart.querySelector(`[data-row="${CSS.escape(id)}"]`)) chart.classList.toggle("faded", on);
  }
  for (const part of all("tr.row[data-row], .legend li, .line")) {
    part.addEventListener("pointerenter", () => light(part.dataset.row, true));
    part.addEventListener("pointerleave", () => light(part.dataset.row, false));
  }
  for (const part of all(".line, .legend li")) {
    part.style.cursor = "pointer";
    part.addEventListener("click", () => { location.hash = `#${part.dataset.row}`; });
  }

  // -- details ---------------------------------------------------------------------------------
  let back = null;
  function opened() {
    const id = decodeURIComponent(location.hash.slice(1));
    const detail = id && document.getElementById(id);
    if (!detail || !detail.classList.contains("detail")) return;
    recalls(detail.querySelector(".recalls"));
    detail.querySelector("h2").focus({ preventScroll: true });
    detail.scrollTop = 0;
  }
  function close() {
    const open = document.querySelector(".detail:target");
    if (!open) return;
    const y = scrollY;
    location.hash = "#_";  // names nothing, so nothing scrolls
    scrollTo(0, y);
    if (back) back.focus({ preventScroll: true });
  }
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (!link) return;
    if (link.classList.contains("close")) {
      event.preventDefault();
      close();
    } else if (link.closest("tr.row")) {
      back = link;
    }
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") close(); });
  addEventListener("hashchange", opened);

  function recalls(place) {
    const kept = data.recalls[place.dataset.row];
    if (!kept || place.dataset.drawn) return;
    place.dataset.drawn = "yes";
    place.textContent = "";
    const classes = data.classes[kept[0]];
    for (const [unseen, title] of [[1, "Unseen classes"], [0, "Seen classes"]]) {
      const some = classes.map((c, i) => [c[0], c[1], c[2], kept[1][i] / 10]).filter((c) => c[1] === unseen);
      if (!some.length) continue;
      some.sort((a, b) => b[3] - a[3]);
      const heading = document.createElement("h4");
      heading.textContent = `${title}, mean over seeds, %`;
      place.append(heading);
      for (const [name, , count, recall] of some) {
        const line = document.createElement("div");
        line.className = "recall";
        line.title = `${name}: ${recall.toFixed(1)} % of ${count} samples`;
        const [label, bar, value] = ["b", "i", "span"].map((tag) => line.appendChild(document.createElement(tag)));
        label.textContent = name;
        bar.style.setProperty("--w", `${recall}%`);
        value.textContent = recall.toFixed(1);
        place.append(line);
      }
    }
  }

  // -- trials ----------------------------------------------------------------------------------
  const PAGE = 50;
  const table = document.getElementById("trial-table");
  const state = document.getElementById("state");
  const shared = ["sweep", "benchmark", "model", "text"];
  let order = null, chosen = null, page = 0, by = "HM", sign = -1;
  for (const name of trials.states) state.add(new Option(name));
  function key(i) {
    if (shared.includes(by)) return trials.groups[trials.group[i]][by];
    return by === "state" ? trials.states[trials.state[i]] : trials[by][i];
  }
  function sorted() {
    if (order) return order;
    const keys = trials.number.map((_, i) => key(i));
    order = keys.map((_, i) => i).sort((a, b) => compare(keys[a], keys[b], sign) || a - b);
    return order;
  }
  function visible() {
    if (chosen) return chosen;
    const f = wanted();
    const groups = trials.groups.map((g) => Object.keys(f).every((k) => fits(g[k], f[k])));
    const asked = trials.states.indexOf(state.value);
    chosen = sorted().filter((i) => groups[trials.group[i]] && (asked < 0 || trials.state[i] === asked));
    return chosen;
  }
  function list() {
    const found = visible();
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    const part = found.slice(page * PAGE, (page + 1) * PAGE);
    document.getElementById("where").textContent = found.length ? `${page * PAGE + 1}–${page * PAGE + part.length} of ${found.length.toLocaleString("en")}` : "no trial fits";
    for (const button of all("#pager button")) button.disabled = ["first", "back"].includes(button.dataset.page) ? page === 0 : page === pages - 1;
    table.tBodies[0].replaceChildren(...part.map(line));
  }
  function line(i) {
    const g = trials.groups[trials.group[i]];
    const row = document.createElement("tr");
    const add = (text, cls) => {
      const cell = row.insertCell();
      cell.className = cls;
      cell.textContent = text ?? "";
      return cell;
    };
    for (const k of shared) add(g[k], "name");
    add(trials.number[i], "num");
    add(trials.states[trials.state[i]], "name");
    for (const k of ["S", "U", "HM", "ZSL"]) add(trials[k][i] === null ? "" : (trials[k][i] / 100).toFixed(2), "num");
    add(trials.epochs[i], "num");
    add(trials.seconds[i], "num");
    add(trials.values[i].map((v, n) => (v === null ? "" : `${g.names[n]} ${v}`)).filter(Boolean).join(" · "), "params");
    add("", "name").append(Object.assign(document.createElement("code"), { textContent: trials.run[i] }));
    return row;
  }
  table.tHead.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    sign = mark(button);
    by = button.dataset.sort;
    order = chosen = null;
    page = 0;
    list();
  });
  document.getElementById("pager").addEventListener("click", (event) => {
    const step = event.target.dataset.page;
    if (!step) return;
    page = { first: 0, back: page - 1, on: page + 1, last: Infinity }[step];
    list();
  });
  state.addEventListener("change", () => { chosen = null; page = 0; list(); });
  form.addEventListener("change", filter);
  form.addEventListener("reset", () => setTimeout(filter));
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
  opened();
})();
