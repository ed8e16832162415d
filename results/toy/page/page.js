"use strict";
// Data, files and elements. Texts of runs are only ever set as text nodes: nothing here parses HTML.

const taken = new Map(); // name → value of the data files that are loaded
const loading = new Map(); // file → promise

function take(name, text) {
  taken.set(name, JSON.parse(text));
}

function loadScript(file) {
  if (!loading.has(file)) {
    loading.set(file, new Promise((done, failed) => {
      const script = document.createElement("script");
      script.src = file;
      script.onload = () => done();
      script.onerror = () => failed(new Error(`${file} is missing in this page's folder`));
      document.head.append(script);
    }));
  }
  return loading.get(file);
}

/** Return the value of data/<name>.js. Throws where the file is gone. */
async function need(name) {
  if (!taken.has(name)) await loadScript(`data/${name}.js`);
  return taken.get(name);
}

/** Make an element. Attributes: "on…" are listeners, others are set as text; children: nodes or texts. */
function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.flat(Infinity).filter((child) => child != null));
  return made;
}

const byId = (id) => document.getElementById(id);
const say = (text) => { byId("told").textContent = text; };

function format(value, decimals) {
  if (value == null) return "";
  const text = value.toFixed(decimals);
  return (/^-0\.?0*$/.test(text) ? text.slice(1) : text).replace("-", "−");
}
const signed = (value, decimals) => {
  const text = format(value, decimals);
  return !text || text.startsWith("−") || !/[1-9]/.test(text) ? text : `+${text}`;
};
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const plain = (value) =>
  value == null ? "" : typeof value === "object" ? JSON.stringify(value) : typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(6))) : String(value);

function fillSelect(select, options, chosen) {
  select.replaceChildren(...options.map(([value, label]) => el("option", { value }, label)));
  if (options.some(([value]) => String(value) === String(chosen))) select.value = chosen;
}

/** A table of texts: headings, then rows whose first entry is a heading too. Entries may be nodes. */
function plainTable(headings, rows) {
  return el("table", { class: "plain" },
    el("thead", {}, el("tr", {}, headings.map((text) => (text === "" ? el("td") : el("th", { scope: "col" }, text))))),
    el("tbody", {}, rows.map(([name, ...cells]) =>
      el("tr", {}, el("th", { scope: "row" }, name), cells.map((cell) => el("td", {}, cell == null ? "" : cell))))));
}

/** Return the parts of a link: what stands behind #, separated by /, decoded. */
function linkParts() {
  return location.hash.slice(1).split("?")[0].split("/").map((part) => {
    try { return decodeURIComponent(part); } catch { return part; }
  });
}
function itemLink(run, id, sample, task) {
  const asked = [sample ? `sample=${sample}` : "", task ? `task=${encodeURIComponent(task)}` : ""].filter(Boolean).join("&");
  return `#${encodeURIComponent(run)}/${id.split("/").map(encodeURIComponent).join("/")}${asked && `?${asked}`}`;
}

/** A list of many rows by DataTables, which draws one page of it at a time; texts are set as text.
 *
 * headings; count() rows; cell(place, column) → text or node; order(column) → numbers or texts by place to sort by, null:
 * as it is; chosen(place) is called when a row is chosen. Returns {refresh, show(place), step(by), current}. */
function itemList(holder, { headings, label, count, cell, order, chosen }) {
  const table = el("table", { class: "items", "aria-label": label });
  holder.replaceChildren(table);
  let sorted = [], current = -1;
  const grid = new DataTable(table, {
    serverSide: true, processing: false, searching: false, pageLength: 25, lengthChange: false, autoWidth: false, order: [],
    layout: { topStart: null, topEnd: null, bottomStart: "info", bottomEnd: "paging" },
    language: { info: "_START_ to _END_ of _TOTAL_", infoEmpty: "none", emptyTable: "no item", zeroRecords: "no item" },
    columns: headings.map((title) => ({ title, data: null, orderSequence: ["asc", "desc", ""] , render: () => "" })),
    columnDefs: [{ targets: "_all", createdCell: (box, _, row, __, column) => box.replaceChildren(cell(row.place, column) ?? "") }],
    createdRow: (line, row) => {
      line.dataset.place = row.place;
      line.classList.toggle("current", row.place === current);
      if (row.place === current) line.setAttribute("aria-current", "true");
    },
    ajax: (asked, answer) => {
      sorted = [...Array(count()).keys()];
      const [by] = asked.order;
      const keys = by && order(by.column);
      if (keys) {
        const sign = by.dir === "desc" ? -1 : 1;
        sorted.sort((a, b) => sign * (keys[a] < keys[b] ? -1 : keys[a] > keys[b] ? 1 : 0) || a - b);
      }
      answer({
        draw: asked.draw, recordsTotal: sorted.length, recordsFiltered: sorted.length,
        data: sorted.slice(asked.start, asked.start + asked.length).map((place) => ({ place })),
      });
    },
  });
  table.addEventListener("click", (event) => {
    const line = event.target.closest("tr[data-place]");
    if (line && !event.target.closest("a")) choose(Number(line.dataset.place));
  });
  function mark(place) {
    current = place;
    const page = Math.floor(sorted.indexOf(place) / grid.page.len());
    if (page >= 0 && page !== grid.page()) return grid.page(page).draw("page");
    for (const line of table.querySelectorAll("tr[data-place]")) {
      const is = Number(line.dataset.place) === place;
      line.classList.toggle("current", is);
      if (is) line.setAttribute("aria-current", "true"); else line.removeAttribute("aria-current");
    }
  }
  function choose(place) {
    mark(place);
    chosen(place);
  }
  return {
    refresh() { current = -1; grid.ajax.reload(null, true); },
    mark,
    step(by) {
      const at = current < 0 ? (by > 0 ? 0 : -1) : sorted.indexOf(current) + by;
      if (at >= 0 && at < sorted.length) choose(sorted[at]);
      else say(sorted.length ? (by > 0 ? "That was the last item." : "That was the first item.") : "No item.");
    },
  };
}

// Texts of runs, shown as they are: what cannot be seen by its name, long ones folded, searched words marked.

const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;
const FOLD = 1500, STEP = 100000; // characters shown at first, and added at a time

/** Append `text` to `holder`: characters that change or hide others (controls, right-to-left marks) by their code point. */
function appendText(holder, text, words = "") {
  const pieces = words ? text.split(new RegExp(`(${words.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")})`, "giu")) : [text];
  for (const [number, piece] of pieces.entries()) {
    const target = number % 2 ? el("mark") : holder;
    let from = 0;
    for (const found of piece.matchAll(UNSEEN)) {
      if (found[0] === "\n" || found[0] === "\t") continue;
      if (found.index > from) target.append(piece.slice(from, found.index));
      const code = found[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      target.append(el("span", { class: "unseen" }, `⟨U+${code}⟩`));
      from = found.index + found[0].length;
    }
    if (from < piece.length) target.append(piece.slice(from));
    if (number % 2) holder.append(target);
  }
}

/** Return a block that shows a text; null: "not at hand". A long one is folded, opened where a searched word is behind. */
function textBlock(text, { words = "", name = "text" } = {}) {
  if (text == null) return el("p", { class: "none" }, "not at hand");
  if (text === "") return el("p", { class: "none" }, "empty");
  const body = el("pre", { class: "text", dir: "auto" });
  let end = Math.min(FOLD, text.length);
  if (words && text.slice(0, end).toLowerCase().includes(words.toLowerCase()) === false && text.length <= STEP) end = text.length;
  if (text.length - end < 200) end = text.length;
  appendText(body, text.slice(0, end), words);
  if (end === text.length) return body;
  const more = el("button", { type: "button" }, "");
  const label = () => { more.textContent = `show more of this ${name} (${end.toLocaleString("en")} of ${text.length.toLocaleString("en")} characters)`; };
  more.addEventListener("click", () => {
    const next = Math.min(end + STEP, text.length);
    appendText(body, text.slice(end, next), words);
    end = next;
    if (end === text.length) more.remove(); else label();
  });
  label();
  return el("div", {}, body, more);
}

/** Return the first characters of a text on one line. */
function snippet(text, length = 90) {
  const holder = el("span", { dir: "auto" });
  const line = (text ?? "").slice(0, 4 * length).replace(/\s+/g, " ").trim();
  appendText(holder, line.length > length ? `${line.slice(0, length)} …` : line);
  return holder;
}

/** A button that copies a text, and says so. */
function copyButton(text, what) {
  return el("button", { type: "button", onclick: async (event) => {
    const button = event.currentTarget;
    try {
      await navigator.clipboard.writeText(text);
    } catch { // file:// may have no clipboard
      const area = el("textarea", { "aria-hidden": "true", class: "away" });
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "copied";
    say(`${what} is copied`);
  } }, "copy");
}

// The table: what its cells show, which rows and columns.

let grid = null;

function startTable() {
  const page = taken.get("page");
  const head = byId("table").querySelectorAll("thead th");
  grid = new DataTable("#table", {
    paging: false, info: false, order: [], autoWidth: false,
    layout: { topStart: null, topEnd: null, bottomStart: null, bottomEnd: null },
    columnDefs: [{ targets: "_all", orderSequence: ["asc", "desc", ""] }],
  });
  for (const filter of document.querySelectorAll(".row-filter")) {
    filter.addEventListener("change", () => {
      const column = Number(filter.dataset.column);
      grid.search.fixed(`name${column}`, (_, __, index) => !filter.value || page.rows[index].names[column] === filter.value);
      grid.draw();
      say(`${grid.rows({ search: "applied" }).count()} of ${page.rows.length} rows`);
    });
  }
  byId("column-choice").append(...[...head].map((heading, number) => {
    const used = number > 2 || page.rows.some((row) => row.names[number]);
    if (!used) grid.column(number).visible(false);
    const box = el("input", { type: "checkbox", checked: used, onchange: () => grid.column(number).visible(box.checked) });
    return el("label", {}, box, ` ${heading.textContent.trim()}`);
  }));
  const seeds = [...new Set(page.rows.flatMap((row) => row.cells.flatMap((cell) => Object.keys(cell.values))))];
  byId("shown").append(...seeds.map((seed) => el("option", { value: `seed ${seed}` }, `seed ${seed}`)));
  byId("shown").addEventListener("change", showCells);
  byId("against").addEventListener("change", showCells);
}

function showCells() {
  const page = taken.get("page"), mode = byId("shown").value, against = page.rows[Number(byId("against").value)];
  byId("against-label").hidden = mode !== "difference";
  grid.cells().every(function () {
    const link = this.node().querySelector("a[data-cell]");
    if (!link) return;
    const [row, column] = link.dataset.cell.split(" ").map(Number);
    const { decimals } = page.columns[column], cell = page.rows[row].cells[column];
    const [text, value] = cellText(mode, cell, against.cells[column], decimals);
    link.textContent = text || "–";
    this.node().dataset.order = value ?? "";
    const isMean = !mode.startsWith("seed "); // count and rank are the mean's
    for (const sign of this.node().querySelectorAll(".count, .sign")) sign.hidden = !isMean;
    if (cell.mark) this.node().classList.toggle(cell.mark, isMean);
  });
  grid.rows().invalidate("dom").draw();
}

/** Return what a cell shows in a mode, and the number that it is sorted by. */
function cellText(mode, cell, against, decimals) {
  if (!cell.n) return [cell.status === "missing" ? "" : cell.status, null];
  if (mode === "interval") {
    const between = cell.low == null ? " (one seed)" : ` [${format(cell.low, decimals)}, ${format(cell.high, decimals)}]`;
    return [format(cell.mean, decimals) + between, cell.mean];
  }
  if (mode === "seeds") {
    return [Object.entries(cell.values).map(([seed, value]) => `${seed}: ${format(value, decimals)}`).join(", "), cell.mean];
  }
  if (mode === "difference") {
    const difference = against.n ? cell.mean - against.mean : null;
    return [signed(difference, decimals), difference];
  }
  if (mode.startsWith("seed ")) {
    const value = cell.values[mode.slice(5)];
    return [format(value, decimals), value];
  }
  return [cell.text, cell.mean];
}

// Curves of the training by BokehJS, drawn on demand: zoom by wheel or box, values under the pointer.

const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f"];
const DASHES = ["solid", "dashed", "dotted", "dotdash"];

/** Return the curves that some of the logs have: their names, and "shares" where terms have some. */
function curveNames(runs) {
  const names = new Set(runs.flatMap((run) => Object.keys(run.log)));
  for (const name of ["step", "epoch"]) names.delete(name);
  const shares = [...names].some((name) => name.startsWith("share_"));
  const first = ["loss", "task"].filter((name) => names.delete(name));
  return [...first, ...(shares ? ["share of each term"] : []), ...[...names].sort()];
}

/** Draw one curve of several runs into `holder`, with the numbers as a table below it. */
async function drawCurves(holder, runs, name) {
  const shown = runs.filter((run) => run.log.step);
  if (!shown.length) return holder.replaceChildren(el("p", { class: "none" }, "no log is at hand"));
  await loadScript("lib/bokeh.js");
  await loadScript("lib/bokeh-api.js");
  const style = getComputedStyle(document.body), ink = style.color, paper = style.backgroundColor;
  const plot = Bokeh.Plotting.figure({
    height: 320, sizing_mode: "stretch_width", tools: "pan,box_zoom,wheel_zoom,reset,save",
    x_axis_label: "step", y_axis_label: name, background_fill_color: paper, border_fill_color: paper, outline_line_color: ink,
  });
  for (const axis of [plot.xaxis, plot.yaxis]) {
    Object.assign(axis, { axis_label_text_color: ink, major_label_text_color: ink, axis_line_color: ink, major_tick_line_color: ink, minor_tick_line_color: ink });
  }
  for (const line of [plot.xgrid, plot.ygrid]) Object.assign(line, { grid_line_alpha: 0.25 });
  const lines = [];
  for (const [place, run] of shown.entries()) {
    const names = name === "share of each term" ? Object.keys(run.log).filter((key) => key.startsWith("share_")) : [name];
    for (const [number, key] of names.entries()) {
      const values = run.log[key];
      if (!values) continue;
      const label = names.length > 1 ? `${run.label} ${key.slice(6)}` : run.label;
      const colour = COLOURS[(names.length > 1 ? number : place) % COLOURS.length];
      const dash = DASHES[(names.length > 1 ? place : Math.floor(place / COLOURS.length)) % DASHES.length];
      const source = new Bokeh.ColumnDataSource({ data: { x: run.log.step, y: values.map((y) => y ?? NaN), run: values.map(() => label) } });
      const drawn = plot.line({ field: "x" }, { field: "y" }, { source, line_color: colour, line_width: 2, line_dash: dash, legend_label: label });
      plot.add_tools(new Bokeh.HoverTool({ renderers: [drawn], tooltips: [["run", "@run"], ["step", "@x"], [key, "@y{0.0000}"]] }));
      lines.push([label, values]);
    }
  }
  if (plot.legend) Object.assign(plot.legend, { click_policy: "hide", background_fill_color: paper, background_fill_alpha: 0.8, label_text_color: ink, border_line_color: ink });
  const place = el("div", { class: "plot", role: "group", "aria-label": `${name} over the steps of ${shown.length} runs; the numbers are in the table below` });
  const numbers = el("details", {}, el("summary", {}, "the numbers"), el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "The curve's numbers" },
    plainTable(["", "first", "lowest", "highest", "last"], lines.map(([label, values]) => {
      const known = values.filter((value) => value != null);
      return [label, ...[known[0], Math.min(...known), Math.max(...known), known.at(-1)].map(plain)];
    }))));
  holder.replaceChildren(place, numbers);
  await Bokeh.Plotting.show(plot, place);
}

// A cell: its runs side by side, their curves, scores, settings, commands and files.

let cellState = { row: 0, column: 0, beside: 0, runs: [], others: [] };

function startCell() {
  for (const key of ["row", "column", "beside"]) {
    byId(`cell-${key}`).addEventListener("change", () => {
      const { row, column, beside } = { ...cellState, [key]: Number(byId(`cell-${key}`).value) };
      location.hash = `/cell/${row}/${column}/${beside}`;
    });
  }
  byId("curve").addEventListener("change", showCurves);
  byId("curve-beside").addEventListener("change", showCurves);
}

/** Return a run's value in a cell. */
const ownValue = (run, cell, decimals) => (cell.runs.includes(run.id) && format(cell.values[run.seed] ?? null, decimals)) || "–";

/** Load the runs behind a cell, each with its label; those without a result are left out. */
async function runsOfCell(row, column) {
  const page = taken.get("page");
  const wanted = page.rows[row].cells[column].all_runs;
  const listed = page.runs.filter((run) => wanted.includes(run.id));
  return Promise.all(listed.map(async (run) => {
    const found = await need(`run-${run.number}`);
    return { ...found, listed: run, label: `${page.rows[row].names.filter(Boolean).join(", ")}, seed ${run.seed ?? "–"}` };
  }));
}

async function showCell([row = 0, column = 0, beside]) {
  const page = taken.get("page");
  row = Math.min(Number(row) || 0, page.rows.length - 1);
  column = Math.min(Number(column) || 0, page.columns.length - 1);
  const near = beside === undefined ? (row + 1 < page.rows.length ? row + 1 : Math.max(row - 1, 0)) : Math.min(Number(beside) || 0, page.rows.length - 1);
  cellState = { row, column, beside: near, runs: [], others: [] };
  for (const key of ["row", "column", "beside"]) byId(`cell-${key}`).value = cellState[key];
  const shown = page.columns[column], cell = page.rows[row].cells[column];
  byId("cell-heading").textContent = `${page.rows[row].names.filter(Boolean).join(", ")}: ${shown.heading}`;
  const paper = cell.paper ? ` Paper: ${cell.paper} (${cell.paper_source}), difference ${cell.difference_text}.` : "";
  const interval = cell.low == null ? "" : `, 95 % interval over seeds ${format(cell.low, shown.decimals)} to ${format(cell.high, shown.decimals)}`;
  byId("cell-value").textContent = cell.n ? `${cell.text} over ${cell.n} of ${cell.planned} runs${interval}.${paper}` : `No value: ${cell.status}.${paper}`;
  byId("cell-compare").href = `#/compare/${column}/${row}/${near}`;
  byId("cell-compare").hidden = !shown.task;
  const lost = cell.lost.map((one) => `${one.run_id}: ${one.status}${one.error ? `, ${one.error}` : ""}`);
  const runs = await runsOfCell(row, column), others = await runsOfCell(near, column);
  const absent = cell.all_runs.filter((id) => !runs.some((run) => run.listed.id === id)).map((id) => `${id} has no result`);
  const missing = [...lost, ...absent, ...runs.flatMap((run) => run.missing.map((text) => `${run.id}: ${text}`))];
  byId("cell-missing").replaceChildren(...(missing.length ? [el("ul", { class: "missing" }, missing.map((text) => el("li", {}, text)))] : []));
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.facts)))];
  const link = (run) => Object.entries(run.listed.tasks).filter(([, task]) => task.n).map(([task, { n }]) =>
    el("a", { href: `#/answers/${encodeURIComponent(run.id)}/${encodeURIComponent(task)}` }, `${n} answers to ${task}`));
  byId("cell-runs").replaceChildren(plainTable(["", ...runs.map((run) => run.id)], [
    ...(shown.mean_of.length ? page.columns.filter((one) => shown.mean_of.includes(one.label)) : [shown]).map((one) =>
      [one.label, ...runs.map((run) => ownValue(run, page.rows[row].cells[one.place], one.decimals))]),
    ["seed", ...runs.map((run) => plain(run.seed))],
    ["answers", ...runs.map((run) => el("span", { class: "links" }, link(run)))],
    ...names.map((name) => [name, ...runs.map((run) => plain(run.facts[name]))]),
    ...Object.keys(runs[0]?.gradient_shares ?? {}).map((term) => [`gradient of ${term}, share of the task's`, ...runs.map((run) => plain(run.gradient_shares[term]))]),
  ]));
  cellState.runs = runs;
  cellState.others = near === row ? [] : others;
  fillSelect(byId("curve"), curveNames(runs).map((name) => [name, name]), byId("curve").value);
  byId("cell-scores").replaceChildren(plainTable(["", "seed", "value", "95 % interval over items", "items", "invalid", "cut"], runs.flatMap((run) =>
    run.scores.map((one) => [`${one.task} ${one.metric}`, plain(run.seed), plain(one.value), one.low == null ? "" : `${plain(one.low)} to ${plain(one.high)}`, plain(one.n), plain(one.invalid), plain(one.num_truncated)]))));
  byId("cell-settings").replaceChildren(settingsTable(runs, cellState.others, near));
  byId("cell-commands").replaceChildren(...runs.filter((run) => run.command).map((run) =>
    el("p", { class: "command" }, el("code", {}, run.command), " ", copyButton(run.command, "The command"))));
  byId("cell-files").replaceChildren(...runs.map((run) => el("details", {}, el("summary", {}, `${run.id}: ${run.files.length} files`),
    el("ul", {}, run.files.map(([name, size]) => el("li", {}, `${name} (${size.toLocaleString("en")} bytes)`))))));
  await showCurves();
}

function settingsTable(runs, others, near) {
  const page = taken.get("page"), base = runs[0]?.base_config ?? {};
  const columns = [...runs, ...others.slice(0, 1)];
  const keys = [...new Set(columns.flatMap((run) => Object.keys(run.config)))].filter((key) => {
    const values = columns.map((run) => JSON.stringify(run.config[key]));
    return new Set(values).size > 1 || (Object.keys(base).length && JSON.stringify(base[key]) !== values[0]);
  });
  if (!keys.length) return el("p", {}, "No setting differs.");
  return plainTable(["", "base", ...runs.map((run) => run.id), ...others.slice(0, 1).map(() => `beside: ${page.rows[near].names.filter(Boolean).join(", ")}`)],
    keys.map((key) => [key, plain(base[key]), ...columns.map((run) => plain(run.config[key]))]));
}

async function showCurves() {
  const { runs, others } = cellState;
  await drawCurves(byId("curves"), byId("curve-beside").checked ? [...runs, ...others] : runs, byId("curve").value);
}

// The answers of a run to a task: the list, its filters and search, one item at a time.

const SIGNS = { right: "✓ right", partly: "◐ partly", wrong: "✗ wrong", invalid: "∅ invalid", cut: "✂ cut", ungraded: "– not graded", rated: "rated" };
const NOTHING = { run: null, task: null, answers: null, at: null, shown: [], words: "" };
let answersState = { ...NOTHING };

/** Return the answers of a run to a task: arrays by place. Throws where they are not in the page. */
async function loadAnswers(run, task) {
  const files = run.tasks[task];
  if (!files?.answers) throw new Error(`${run.id} has no answers to ${task} in this page: ${(files?.missing ?? ["there are none"]).join("; ")}`);
  const [answers, items] = await Promise.all([need(files.answers), need(files.items)]);
  const found = { ...answers, ...items, length: items.id.length };
  found.place ??= new Map(items.id.map((id, place) => [`${id} ${items.sample[place]}`, place]));
  return found;
}

const promptOf = (answers, place) => (answers.prompt ? answers.prompt[place] : answers.frame[0] + answers.question[place] + answers.frame[1]);

/** Return the task that a link to an item means where it names none: a lower rank's answers have the same ids. */
function taskOf(run, id) {
  const names = Object.keys(run.tasks).filter((name) => run.tasks[name].prefix === id.split("/")[0]);
  return names.find((name) => !name.startsWith("ranks/")) ?? names[0];
}

/** Return the link to an answer of the task that is shown. */
function linkTo(place) {
  const { answers, run, task } = answersState, id = answers.id[place];
  return itemLink(run.id, id, answers.sample[place], task === taskOf(run, id) ? null : task);
}

/** Return the verdict on an answer by a metric; a metric that is no share of right and wrong only "rates". */
function verdictOf(answers, place, metric) {
  if (!answers.is_graded[place]) return "ungraded";
  const value = answers.metrics?.[place]?.[metric];
  if (answers.invalid[place]) return "invalid";
  if (value == null) return "ungraded";
  if (metric.startsWith("rating") || metric === "error") return "rated";
  const share = answers.lower?.includes(metric) ? 1 - value : value;
  return share >= 1 ? "right" : share > 0 ? "partly" : "wrong";
}
const isCut = (answers, place) => answers.finish?.[place] === "length";

function startAnswers() {
  const page = taken.get("page");
  fillSelect(byId("answers-run"), page.runs.map((run) => [run.id, run.id]));
  fillSelect(byId("answers-other"), [["", "no other run"], ...page.runs.map((run) => [run.id, run.id])]);
  byId("answers-run").addEventListener("change", () => go(byId("answers-run").value, answersState.task));
  byId("answers-task").addEventListener("change", () => go(byId("answers-run").value, byId("answers-task").value));
  for (const id of ["metric", "verdict", "group"]) byId(`answers-${id}`).addEventListener("change", filterAnswers);
  byId("answers-search").addEventListener("input", filterAnswers);
  byId("answers-other").addEventListener("change", () => showItem(answersState.at));
  answersState.list = itemList(byId("answers-list"), {
    headings: ["item", "verdict", "question", "extracted", "gold"],
    label: "Answers",
    count: () => answersState.shown.length,
    cell: (row, column) => answerCell(answersState.shown[row], column),
    order: (column) => answersState.shown.map((place) => answerKey(place, column)),
    chosen: (row) => { location.hash = linkTo(answersState.shown[row]).slice(1); },
  });
  function go(run, task) { location.hash = `/answers/${encodeURIComponent(run)}/${encodeURIComponent(task ?? "")}`; }
}

function answerCell(place, column) {
  const { answers } = answersState, metric = byId("answers-metric").value;
  if (column === 0) {
    return el("a", { href: linkTo(place) }, answers.id[place] + (answers.sample[place] ? ` (${answers.sample[place]})` : ""));
  }
  if (column === 1) {
    const verdict = verdictOf(answers, place, metric), value = answers.metrics?.[place]?.[metric];
    const text = verdict === "rated" ? plain(value) : SIGNS[verdict];
    return el("span", { class: `verdict-${verdict}` }, text + (isCut(answers, place) ? " ✂ cut" : ""));
  }
  if (column === 2) return snippet(answers.question[place], 70);
  if (column === 3) return snippet(extractedOf(place), 30);
  return snippet(answers.gold[place], 30);
}
const extractedOf = (place) => {
  const { answers } = answersState, found = answers.extracted?.[place];
  return found ? found[byId("answers-metric").value] ?? found.outcome ?? found.ratings ?? Object.values(found)[0] : answers.completion?.[place];
};
function answerKey(place, column) {
  const { answers } = answersState;
  if (column === 0) return Number(answers.id[place].split("/").find((part) => /^\d+$/.test(part)) ?? place);
  if (column === 1) return answers.metrics?.[place]?.[byId("answers-metric").value] ?? -1;
  return (column === 2 ? answers.question[place] : column === 3 ? extractedOf(place) : answers.gold[place]) ?? "";
}

/** Return the lower-case text of each answer that the search looks through. */
function searchedTexts(answers) {
  answers.searched ??= answers.id.map((id, place) =>
    [id, answers.question[place], answers.completion?.[place], answers.gold[place], ...Object.values(answers.extracted?.[place] ?? {})].filter(Boolean).join("\n").toLowerCase());
  return answers.searched;
}

function filterAnswers() {
  const { answers } = answersState;
  if (!answers) return;
  const metric = byId("answers-metric").value, verdict = byId("answers-verdict").value, group = byId("answers-group").value;
  const words = byId("answers-search").value.toLowerCase();
  const texts = words && searchedTexts(answers);
  answersState.words = words;
  answersState.shown = [];
  for (let place = 0; place < answers.length; place++) {
    if (verdict && (verdict === "cut" ? !isCut(answers, place) : verdictOf(answers, place, metric) !== verdict)) continue;
    if (group && !Object.entries(answers.groups[place]).some(([key, value]) => `${key}: ${value}` === group)) continue;
    if (words && !texts[place].includes(words)) continue;
    answersState.shown.push(place);
  }
  byId("answers-count").textContent = `${answersState.shown.length} of ${answers.length} answers`;
  answersState.list.refresh();
}

/** Show the answers of a run to a task, and of them one; run and task by name. */
async function showAnswers(runId, task, id, sample = 0) {
  const page = taken.get("page");
  const run = page.runs.find((one) => one.id === runId) ?? page.runs.find((one) => Object.values(one.tasks).some((of) => of.n));
  if (runId && run?.id !== runId) say(`No run ${runId} in this page.`);
  if (run?.id !== runId) id = undefined;
  if (!run) { byId("answers-count").textContent = "No run of this page has answers at hand."; return; }
  const names = Object.keys(run.tasks);
  const chosen = names.includes(task) ? task : id && taskOf(run, id);
  const wanted = names.includes(chosen) ? chosen : names.find((name) => run.tasks[name].n) ?? names[0];
  byId("answers-run").value = run.id;
  fillSelect(byId("answers-task"), names.map((name) => [name, `${name} (${run.tasks[name].n})`]), wanted);
  if (answersState.run !== run || answersState.task !== wanted) {
    try {
      const answers = await loadAnswers(run, wanted);
      Object.assign(answersState, NOTHING, { run, task: wanted, answers });
    } catch (error) {
      Object.assign(answersState, NOTHING);
      byId("answers-count").textContent = error.message;
      byId("answers-item").replaceChildren();
      answersState.list.refresh();
      return;
    }
    const { answers } = answersState;
    fillSelect(byId("answers-metric"), (answers.metric_names.length ? answers.metric_names : ["none"]).map((name) => [name, name]), byId("answers-metric").value);
    const groups = [...new Set(answers.groups.flatMap((of) => Object.entries(of).map(([key, value]) => `${key}: ${value}`)))].sort();
    fillSelect(byId("answers-group"), [["", "all"], ...groups.map((group) => [group, group])]);
    byId("answers-item").replaceChildren();
    filterAnswers();
  }
  const { answers } = answersState;
  const place = id ? answers.place.get(`${id} ${sample}`) : answersState.shown[0];
  if (id && place === undefined) say(`${run.id} has no answer to ${id} in this page.`);
  if (place !== undefined) await showItem(place);
}

async function showItem(place) {
  if (place == null) return;
  const { answers, run, task, words } = answersState;
  answersState.at = place;
  answersState.list.mark(answersState.shown.indexOf(place));
  const other = taken.get("page").runs.find((one) => one.id === byId("answers-other").value);
  const sides = [itemView(answers, place, words, run.id)];
  if (other) {
    try {
      const theirs = await loadAnswers(other, task);
      const found = theirs.place.get(`${answers.id[place]} ${answers.sample[place]}`);
      sides.push(found === undefined ? el("p", {}, `${other.id} did not answer this item.`) : itemView(theirs, found, words, other.id));
    } catch (error) {
      sides.push(el("p", { class: "none" }, error.message));
    }
  }
  byId("answers-item").replaceChildren(
    el("h3", {}, el("a", { href: linkTo(place) }, answers.id[place])),
    questionView(answers, place, words),
    el("div", { class: sides.length > 1 ? "sides" : "" }, sides));
  requestAnimationFrame(() => setTimeout(() => performance.mark("answer shown"))); // for scripts/bench_page.py
}

/** What was asked: question, gold and groups, and the whole prompt, folded. */
function questionView(answers, place, words) {
  const prompt = promptOf(answers, place);
  const groups = Object.entries(answers.groups[place]).map(([key, value]) => `${key}: ${value}`).join(", ");
  return el("div", {},
    groups ? el("p", {}, groups) : null,
    el("h4", {}, answers.kind === "classes" ? "Text" : "Question"), textBlock(answers.question[place], { words, name: "question" }),
    answers.gold[place] == null ? null : [el("h4", {}, answers.kind === "classes" ? "Label" : "Gold"), textBlock(answers.gold[place], { words, name: "gold" })],
    prompt == null || answers.kind === "classes" ? null : el("details", {}, el("summary", {}, "The prompt as it was"), textBlock(prompt, { name: "prompt" })));
}

/** One run's answer to an item: of MT-Bench's second turn the first one before it. */
function itemView(answers, place, words, title) {
  const id = answers.id[place], first = id.endsWith("/turn2") ? answers.place.get(`${id.replace(/2$/, "1")} ${answers.sample[place]}`) : undefined;
  return el("div", { class: "side" },
    el("p", { class: "of-run" }, title),
    first === undefined ? null : [el("h4", {}, "First question"), textBlock(answers.question[first], { words }), answerView(answers, first, words, "First answer"), el("h4", {}, "Second question"), textBlock(answers.question[place], { words })],
    answerView(answers, place, words, first === undefined ? (answers.kind === "classes" ? "Prediction" : "Answer") : "Second answer"));
}

function answerView(answers, place, words, heading) {
  const extracted = { ...answers.extracted?.[place] }, program = extracted.program;
  delete extracted.program;
  const facts = [
    ...Object.entries(answers.metrics?.[place] ?? {}).map(([name, value]) => {
      const verdict = verdictOf(answers, place, name);
      return [name, el("span", { class: `verdict-${verdict}` }, verdict === "rated" ? plain(value) : `${SIGNS[verdict]} (${plain(value)})`)];
    }),
    ...Object.entries(extracted).map(([name, text]) => [`extracted, ${name}`.replace("extracted, outcome", "sandbox").replace("extracted, strict_outcome", "sandbox, as it stands"), text == null ? "nothing" : textBlock(text, { words })]),
    ...(answers.finish?.[place] ? [["ended by", answers.finish[place] === "length" ? "✂ length: cut" : answers.finish[place]]] : []),
    ...(answers.invalid[place] ? [["invalid", "no answer could be read"]] : []),
    ...(answers.timeout[place] ? [["time limit", "the grader's was hit"]] : []),
    ...(answers.error?.[place] ? [["grader's error", textBlock(answers.error[place])]] : []),
    ...Object.entries(answers.probabilities?.[place] ?? {}).map(([label, p]) => [`p(${label})`, el("span", {}, el("meter", { min: 0, max: 1, value: p, "aria-label": `p(${label})` }), ` ${plain(p)}`)]),
  ];
  return [
    el("h4", {}, heading), textBlock(answers.completion?.[place] ?? null, { words, name: "answer" }),
    program == null ? (answers.kind === "code" ? el("p", { class: "none" }, "no program found in it") : null) : [el("h4", {}, "Program that was run"), textBlock(program, { name: "program" })],
    el("dl", { class: "facts" }, facts.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])),
    (answers.judgements?.[place] ?? []).map((one) => el("div", { class: "judgement" },
      el("h4", {}, `Judgement ${one.index ?? ""} by ${one.judge ?? "?"} ${one.judge_version ?? ""}`), textBlock(one.judgement, { words, name: "judgement" }))),
  ].flat();
}

// Two methods side by side: the items on which they differ, with the numbers that the paired test used.

let compareState = { items: [], shown: [], answers: [], texts: null, list: null };

function startCompare() {
  for (const key of ["column", "a", "b"]) byId(`compare-${key}`).addEventListener("change", () => {
    location.hash = `/compare/${byId("compare-column").value}/${byId("compare-a").value}/${byId("compare-b").value}`;
  });
  byId("compare-kind").addEventListener("change", filterCompared);
  byId("compare-search").addEventListener("input", filterCompared);
  compareState.list = itemList(byId("compare-list"), {
    headings: ["item", "A", "B", "A − B"],
    label: "Items of two methods",
    count: () => compareState.shown.length,
    cell: (row, column) => {
      const one = compareState.items[compareState.shown[row]];
      return column === 0 ? one.id : column === 3 ? signed(one.a - one.b, 3) + (one.a > one.b ? " ▲" : one.a < one.b ? " ▼" : "") : plain(column === 1 ? one.a : one.b);
    },
    order: (column) => compareState.shown.map((place) => {
      const one = compareState.items[place];
      return column === 0 ? place : column === 1 ? one.a : column === 2 ? one.b : one.a - one.b;
    }),
    chosen: (row) => showPair(compareState.items[compareState.shown[row]]),
  });
}

/** Return item → mean value over the runs that the row's mean is of, the runs that have values, and why others have none. */
function valuesOf(row, column, values) {
  const page = taken.get("page");
  const wanted = page.rows[row].cells[column].runs ?? [];
  const runs = wanted.filter((id) => values.runs[id]);
  const sums = new Map();
  for (const id of runs) (values.other_ids[id] ?? values.ids).forEach((item, place) => sums.set(item, (sums.get(item) ?? []).concat(values.runs[id][place])));
  const found = new Map([...sums].filter(([, of]) => of.length === runs.length).map(([item, of]) => [item, mean(of)]));
  const reasons = wanted.filter((id) => values.untested[id]).map((id) => `${id}: ${values.untested[id]}`);
  return { runs, found, reasons };
}

async function showCompare([column, a, b]) {
  const page = taken.get("page"), choice = byId("compare-column");
  const places = [...choice.options].map((option) => option.value);
  const best = places.find((place) => page.columns[place].values) ?? places[0];
  if (best === undefined) return byId("compare-test").replaceChildren(el("p", {}, "No column of this table has items."));
  column = places.includes(column) ? column : best;
  const filled = [...page.rows.keys()].filter((row) => page.rows[row].cells[column].n);
  a = page.rows[a] ? Number(a) : filled[0] ?? 0;
  b = page.rows[b] ? Number(b) : filled.find((row) => row !== a) ?? a;
  choice.value = column;
  byId("compare-a").value = a;
  byId("compare-b").value = b;
  Object.assign(compareState, { column: Number(column), a, b, items: [], shown: [], answers: [], texts: null });
  byId("compare-item").replaceChildren();
  const shown = page.columns[column];
  const values = shown.values ? await need(shown.values) : { ids: [], runs: {}, untested: {}, other_ids: {} };
  const ours = valuesOf(a, column, values), theirs = valuesOf(b, column, values);
  compareState.items = [...ours.found].filter(([id]) => theirs.found.has(id)).map(([id, value]) => ({ id, a: value, b: theirs.found.get(id) }));
  compareState.items.sort((one, other) => one.id.localeCompare(other.id, "en", { numeric: true }));
  const runs = page.runs.filter((run) => ours.runs.includes(run.id) || theirs.runs.includes(run.id));
  const loaded = await Promise.all(runs.map((run) => loadAnswers(run, shown.task).catch(() => null))); // showPair says why
  Object.assign(compareState, { runs: [ours.runs, theirs.runs], answers: loaded.filter(Boolean), texts: null });
  const sign = shown.better === "lower" ? -1 : 1;
  for (const one of compareState.items) one.won = Math.sign(sign * (one.a - one.b));
  byId("compare-test").replaceChildren(...testView(page, shown, ours, theirs));
  filterCompared();
  if (compareState.shown.length) { compareState.list.mark(0); await showPair(compareState.items[compareState.shown[0]]); }
}

function testView(page, shown, ours, theirs) {
  const { a, b, items } = compareState;
  const won = items.filter((one) => one.won > 0).length, lost = items.filter((one) => one.won < 0).length;
  const lines = [];
  if (items.length) {
    const difference = shown.scale * (mean(items.map((one) => one.a)) - mean(items.map((one) => one.b)));
    lines.push(`A is better on ${won} items, B on ${lost}, no difference on ${items.length - won - lost}. A − B over ${items.length} items: ${signed(difference, shown.decimals)} (mean over ${ours.runs.length} and ${theirs.runs.length} runs).`);
  }
  const test = page.comparisons.find((one) => one.column === shown.name && [`${a} ${b}`, `${b} ${a}`].includes(`${one.focus} ${one.other}`));
  if (test) {
    const names = [test.focus, test.other].map((row) => page.rows[row].names.filter(Boolean).join(", "));
    const between = test.low == null ? "" : `, 95 % interval ${signed(test.low, shown.decimals)} to ${signed(test.high, shown.decimals)}`;
    const p = test.p == null ? `; no test: ${test.untested}` : `; p = ${plain(test.p)}, corrected ${plain(test.p_adjusted)}${test.is_significant ? " (significant)" : ""}`;
    lines.push(`Paired test of the report, ${names[0]} − ${names[1]}: ${signed(test.difference, shown.decimals)}${between}${p}${test.num_items == null ? "" : ` (${test.num_items} items)`}.`);
  } else lines.push("The report does not test these two rows against each other.");
  return [...lines, ...[...ours.reasons, ...theirs.reasons].map((reason) => `No items of ${reason}.`)].map((line) => el("p", {}, line));
}

function filterCompared() {
  const kind = byId("compare-kind").value, words = byId("compare-search").value.toLowerCase();
  const wanted = { differ: (one) => one.won !== 0, won: (one) => one.won > 0, lost: (one) => one.won < 0, "": () => true }[kind];
  if (words) compareState.texts ??= textsByItem(compareState.answers);
  compareState.shown = [];
  compareState.items.forEach((one, place) => {
    if (wanted(one) && (!words || one.id.toLowerCase().includes(words) || (compareState.texts.get(one.id) ?? "").includes(words))) compareState.shown.push(place);
  });
  byId("compare-count").textContent = `${compareState.shown.length} of ${compareState.items.length} items`;
  compareState.list.refresh();
}

/** Return item → what the search looks through: the runs' texts; the turns and samples of one item are one text. */
function textsByItem(runs) {
  const found = new Map();
  for (const answers of runs) {
    const texts = searchedTexts(answers);
    answers.id.forEach((id, place) => {
      for (const key of new Set([id, id.split("/").slice(0, 2).join("/")])) found.set(key, `${found.get(key) ?? ""}\n${texts[place]}`);
    });
  }
  return found;
}

/** Show the answers of both rows' runs to an item, seed by seed. */
async function showPair(one) {
  const page = taken.get("page"), task = page.columns[compareState.column].task;
  const sides = [];
  let asked = null;
  for (const [side, ids] of compareState.runs.entries()) {
    for (const run of ids.map((id) => page.runs.find((listed) => listed.id === id)).filter(Boolean)) {
      try {
        const answers = await loadAnswers(run, task);
        const places = answers.id.flatMap((id, place) => (id === one.id || id.startsWith(`${one.id}/`) ? [place] : []));
        asked ??= places.length ? questionView(answers, places[0], "") : null;
        sides.push([side, places.map((place) => itemView(answers, place, "", run.id))]);
      } catch (error) {
        sides.push([side, [el("p", { class: "none" }, error.message)]]);
      }
    }
  }
  const name = (row) => page.rows[row].names.filter(Boolean).join(", ");
  byId("compare-item").replaceChildren(
    el("h3", {}, one.id), asked ?? "",
    el("div", { class: "sides" }, [compareState.a, compareState.b].map((row, side) =>
      el("div", {}, el("h4", {}, `${"AB"[side]}: ${name(row)} (${plain(side ? one.b : one.a)})`), sides.filter(([of]) => of === side).flatMap(([, views]) => views)))));
}

// Figures and notes: the comparisons as a table.

function startTraining() {
  const page = taken.get("page"), holder = byId("comparisons");
  if (!holder) return;
  const name = (row) => page.rows[row].names.filter(Boolean).join(", ");
  holder.append(plainTable(["column", "rows", "against", "difference", "95 % interval", "p", "p, corrected", "items"], page.comparisons.map((one) => {
    const column = page.columns.find((of) => of.name === one.column), place = page.columns.indexOf(column);
    const number = (value) => signed(value, column.decimals);
    const link = column.task ? el("a", { href: `#/compare/${place}/${one.focus}/${one.other}` }, number(one.difference)) : number(one.difference);
    const interval = one.low == null ? one.untested ?? "" : `${number(one.low)} to ${number(one.high)}${one.num_items == null ? ` (${one.untested})` : ""}`;
    return [column.label, name(one.focus), name(one.other), link, interval, plain(one.p), `${plain(one.p_adjusted)}${one.is_significant ? " *" : ""}`, plain(one.num_items)];
  })));
}

// Links and keys. #/VIEW/… shows a view, #RUN/ITEM an answer, of a lower rank #RUN/ITEM?task=ranks/….

const VIEWS = ["table", "cell", "answers", "compare", "training"];

function showView(view) {
  for (const name of VIEWS) byId(`view-${name}`).hidden = name !== view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
}

async function route() {
  const parts = linkParts();
  const view = parts[0] === "" ? (VIEWS.includes(parts[1]) ? parts[1] : "table") : "answers";
  showView(view);
  say("");
  document.body.setAttribute("aria-busy", "true");
  try {
    if (view === "cell") await showCell(parts.slice(2));
    if (view === "compare") await showCompare(parts.slice(2));
    if (view === "answers") {
      const asked = new URLSearchParams(location.hash.split("?")[1] ?? "");
      await (parts[0] === "" ? showAnswers(parts[2], parts[3]) : showAnswers(parts[0], asked.get("task"), parts.slice(1).join("/") || null, Number(asked.get("sample") ?? 0)));
    }
  } catch (error) {
    say(error.message);
  }
  document.body.setAttribute("aria-busy", "false");
}

function keys(event) {
  const typing = event.target.closest?.("input[type=search], textarea, select");
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  if (event.key === "Escape" && typing) return event.target.blur();
  if (typing) return;
  const list = !byId("view-answers").hidden ? answersState.list : !byId("view-compare").hidden ? compareState.list : null;
  const step = { ArrowRight: 1, j: 1, ArrowLeft: -1, k: -1 }[event.key];
  if (step && list && !event.target.closest?.(".scroll, .bk-Canvas")) list.step(step);
  else if (event.key === "/") (byId("view-compare").hidden ? openSearch() : byId("compare-search")).focus();
  else if (event.key === "?") byId("help").showModal();
  else if (event.key === "t") location.hash = "/table";
  else return;
  event.preventDefault();
}

function openSearch() {
  if (byId("view-answers").hidden) {
    location.hash = "/answers";
    showView("answers"); // at once: what is hidden takes no focus, and the route comes later
  }
  return byId("answers-search");
}

function start() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const colour = () => document.documentElement.classList.toggle("dark", dark.matches); // DataTables' word for it
  dark.addEventListener("change", colour);
  colour();
  startTable();
  startCell();
  startAnswers();
  startCompare();
  startTraining();
  byId("help-button").addEventListener("click", () => byId("help").showModal());
  addEventListener("keydown", keys);
  addEventListener("hashchange", route);
  route();
}
addEventListener("DOMContentLoaded", start);
